"""What ``dilated tune`` measured on a machine, as the factory uses it: a file of thresholds with their measurements.

The file is JSON, one a user, and says what it was measured on and with. One that was measured elsewhere, or with other
versions, is not used. Imports the standard library and the policy; torch and platformdirs when they are asked for.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dilated_factory.policy import Policy

if TYPE_CHECKING:
    import torch

# The version of the file's form.
FORMAT = 1
# A path of a profile to use instead of the user's own, or "off" for none.
VARIABLE = "DILATED_PROFILE"
# A figure measured with another minor version of one of these says nothing.
MEASURED_WITH = ("torch", "dilated-core", "dilated-memory-pool")
# As ``pool_min_bytes``: more than any tensor has, where a pool was never faster.
NEVER_BYTES = 2**62
# As a rule's kernel: what ``kernel="auto"`` takes was the fastest.
AUTO = "auto"


@dataclass(frozen=True)
class KernelRule:
    """From so many tokens on, in that dtype ("float32"), that kernel is the fastest; AUTO ends the rule before it."""

    dtype: str
    from_length: int
    kernel: str


@dataclass(frozen=True)
class Profile:
    """The thresholds that one machine measured. None, and no rule, leave what the policy says.

    Attributes:
        hardware: ``Hardware.key()`` of what it was measured on.
        device_type: "cpu" or "cuda".
        versions: of the distributions it was measured with.
        created: date and time, UTC, ISO 8601.
        pool_min_bytes: the size of a tensor from which a pool was faster than torch.empty, in bytes; NEVER_BYTES where
            it never was.
        pool_thresholds: (lightweight from, full from), in tokens, None for never; None where not measured.
        kernels: the fastest kernel by dtype and length.
        block_size: the (rows, columns) with which block-sparse attention was the fastest. Another block size is another
            function, so this is told and never applied.
        measurements: every figure that these were taken from.
        path: the file it was read from, "" for none.

    Raises:
        TypeError, ValueError: a field of a wrong type, or thresholds that are out of order.

    >>> Profile("here", "cpu", pool_thresholds=(None, 65536)).policy(Policy()).pool_full_from
    65536
    """

    hardware: str
    device_type: str
    versions: dict[str, str] = field(default_factory=dict, hash=False)
    created: str = ""
    pool_min_bytes: int | None = None
    pool_thresholds: tuple[int | None, int | None] | None = None
    kernels: tuple[KernelRule, ...] = ()
    block_size: tuple[int, int] | None = None
    measurements: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    path: str = ""

    def __post_init__(self) -> None:
        for name in ("hardware", "device_type", "created"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected text, got {getattr(self, name)!r}")
        for rule in self.kernels:
            words = isinstance(rule, KernelRule) and isinstance(rule.dtype, str) and isinstance(rule.kernel, str)
            if not (words and _is_size(rule.from_length)):
                raise TypeError(f"kernels: expected a dtype, a length and a kernel, got {rule}")
        for name in ("pool_thresholds", "block_size"):
            pair = getattr(self, name)
            if pair is None:
                continue
            if len(pair) != 2 or not all(_is_size(one) or (one is None and name != "block_size") for one in pair):
                raise TypeError(f"{name}: expected two sizes, got {pair}")
        if self.pool_min_bytes is not None and not _is_size(self.pool_min_bytes):
            raise TypeError(f"pool_min_bytes: expected a size, got {self.pool_min_bytes!r}")
        if not (isinstance(self.versions, dict) and all(isinstance(one, str) for one in self.versions.values())):
            raise TypeError(f"versions: expected names and versions, got {self.versions!r}")
        if not all(isinstance(one, dict) for one in self.measurements):
            raise TypeError("measurements: expected an object for each")
        self.policy(Policy())  # thresholds out of order are found here

    def policy(self, policy: Policy) -> Policy:
        """``policy`` with the thresholds that were measured."""
        if self.pool_thresholds is None:
            return policy
        lightweight, full = self.pool_thresholds
        return replace(policy, pool_lightweight_from=lightweight, pool_full_from=full)

    def kernel(self, dtype: str, length: int) -> str | None:
        """The kernel that was faster than auto's own choice; None where none was.

        Args:
            dtype: its name, "float32".
            length: tokens.

        >>> Profile("here", "cpu", kernels=(KernelRule("float32", 1024, "cpu_flash"),)).kernel("float32", 4096)
        'cpu_flash'
        """
        rules = [rule for rule in self.kernels if rule.dtype == dtype and rule.from_length <= length]
        kernel = max(rules, key=lambda rule: rule.from_length).kernel if rules else AUTO
        return None if kernel == AUTO else kernel

    def objection(self, hardware: str) -> str | None:
        """Why it says nothing about a machine with what is installed there now; None where it does.

        Args:
            hardware: ``Hardware.key()`` of the machine.

        >>> Profile("there", "cpu").objection("here")
        'it was measured on there, and this is here'
        """
        if self.hardware != hardware:
            return f"it was measured on {self.hardware}, and this is {hardware}"
        for name in MEASURED_WITH:
            then, now = self.versions.get(name), installed_version(name)
            if then is None or now is None or _minor(then) != _minor(now):
                return f"it was measured with {name} {then or 'of an unknown version'}, and {now or 'none'} is here"
        return None

    def save(self, path: Path | str | None = None) -> Path:
        """Write it to a file. Who reads it meanwhile sees the old file or the new one.

        Args:
            path: the file; None for the user's own, ``default_path()``. Its folder is made where it is missing.

        Returns:
            The path that was written.

        Raises:
            OSError: it cannot be written.
        """
        place = default_path() if path is None else Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        partly = place.with_name(f"{place.name}.{os.getpid()}")
        try:
            partly.write_text(json.dumps(self.content(), indent=1) + "\n", encoding="utf-8")
            os.replace(partly, place)
        finally:
            partly.unlink(missing_ok=True)
        return place

    def content(self) -> dict[str, Any]:
        """What its file holds, as plain data.

        >>> Profile("here", "cpu", block_size=(128, 128)).content()["format"]
        1
        """
        return {"format": FORMAT, **{name: value for name, value in asdict(self).items() if name != "path"}}


def load(path: Path | str) -> Profile:
    """Read a profile.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: the file is no profile, or one of another format.

    >>> load("nowhere.json")
    Traceback (most recent call last):
    FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.json'
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, or a number or a nesting that Python's reader refuses
        raise ValueError(f"{path}: no profile: {error}") from error
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path}: expected a profile of format {FORMAT}, got {found!r}; run `dilated tune` again")
    try:
        return replace(_checked(content), path=str(path))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: no profile: {error}; run `dilated tune` again") from error


def _checked(content: dict[str, Any]) -> Profile:
    """The profile of a file's content; TypeError or ValueError where a field is none of its own."""
    expected = {one.name for one in fields(Profile)} - {"path"}
    for what, names in (("unknown", set(content) - expected), ("missing", expected - set(content))):
        if names:
            raise ValueError(f"{what} fields {sorted(names)}")
    content["kernels"] = tuple(KernelRule(**rule) for rule in content["kernels"])
    content["measurements"] = tuple(content["measurements"])
    for name in ("pool_thresholds", "block_size"):
        if content[name] is not None:
            content[name] = tuple(content[name])
    return Profile(**content)


def default_path() -> Path:
    """Where the user's profile is: $DILATED_PROFILE, else profile.json in the user's own folder for configuration."""
    named = os.environ.get(VARIABLE)
    if named and named != "off":
        return Path(named).expanduser()
    import platformdirs

    return Path(platformdirs.user_config_dir("dilated")) / "profile.json"


# What tells one version of a file from the next.
_State = tuple[str, int, int, int]
# By the device and torch's threads, which are part of what a profile is measured on and may change.
_known: dict[tuple[str, int], tuple[_State, Profile | None]] = {}
_warned: set[_State] = set()


def users_profile(device: torch.device | str | None = None) -> Profile | None:
    """The user's profile, where it says something about that device of this machine.

    One that does not, or cannot be read, is left alone with one warning (UserWarning) a file and version of it. It is
    read again when it changes, or when torch has another number of threads.

    Args:
        device: "cpu", "cuda:1", ...; a CUDA device without an index is the current one. None for the best that is
            present, as ``Hardware.detect`` has it.
    """
    named = os.environ.get(VARIABLE)
    if named == "off":
        return None
    path = default_path()
    try:
        found = path.stat()
    except OSError as error:
        if named:  # nobody has to have a profile, but this one was asked for
            _warn_once((str(path), 0, 0, 0), f"the profile that {VARIABLE} names is not used: {error}")
        return None
    state = (str(path), found.st_mtime_ns, found.st_ino, found.st_size)
    import torch

    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    if str(place) == "cuda" and torch.cuda.is_available():  # without an index
        place = torch.device("cuda", torch.cuda.current_device())
    asked = str(place), torch.get_num_threads()
    cached = _known.get(asked)
    if cached is None or cached[0] != state:
        profile, objection = _fitting(path, place)
        if objection is not None:
            _warn_once(state, objection)
        _known[asked] = cached = state, profile
    return cached[1]


def _warn_once(state: _State, words: str) -> None:
    if state not in _warned:
        _warned.add(state)  # of two threads that come here at once, both may warn, and no harm is done
        warnings.warn(words, stacklevel=4)


def _fitting(path: Path, device: torch.device) -> tuple[Profile | None, str | None]:
    """The profile of a file, or what is wrong with it. Neither where it was made for another device of this machine."""
    from dilated_factory.hardware import Hardware

    try:
        profile = load(path)
    except (OSError, ValueError) as error:
        return None, f"the profile is not used: {error}"
    hardware = Hardware.detect(device)
    if profile.device_type != hardware.device_type:
        return None, None
    objection = profile.objection(hardware.key())
    if objection is not None:
        return None, f"the profile {path} is not used: {objection}; run `dilated tune` again"
    return profile, None


def installed_version(distribution: str) -> str | None:
    """The version of a distribution here: its metadata's, else that of a source tree on the path, else None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        import importlib.util

        return "0.1" if importlib.util.find_spec(distribution.replace("-", "_")) else None


def _minor(version: str) -> tuple[str, ...]:
    return tuple(version.partition("+")[0].split(".")[:2])


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
