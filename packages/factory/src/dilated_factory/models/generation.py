"""Writing text with a causal language model: ``generate``, ``stream``, and the checks of what they are given.

What is drawn from the logits is ``sampling``'s affair, where they come from ``decoding``'s. May import torch and this
package's models.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dilated_factory.models.decoding import Autocast, Decoder, Ending, Text, WholePasses, cached, evaluating, uncompiled
from dilated_factory.models.row_caches import LayerCache
from dilated_factory.models.sampling import Sampling

_ID_DTYPES = (torch.int64, torch.int32)

LogitsProcessor = Callable[[Tensor, Tensor], Tensor]


class GeneratesText(nn.Module):
    """``generate`` and ``stream``, for a model with ``vocab_size``, ``last_logits`` and ``layers`` of ``self_attn``."""

    vocab_size: int
    layers: nn.ModuleList

    @abstractmethod
    def last_logits(
        self, tokens: Tensor, caches: Sequence[LayerCache] | None = None, last: Tensor | None = None
    ) -> Tensor:
        """Logits (batch, vocab_size) of what follows column ``last`` (batch,) of tokens, the last one where None."""

    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        key_padding_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        logits_processor: LogitsProcessor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        window: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Append at most ``max_new_tokens`` sampled tokens to each row of ``prompt``.

        Without gradients, in eval mode and uncompiled; every module's own mode is restored after. A token costs what
        attending the keys it reaches costs: each layer keeps those in a cache. With a ``window``, or with an attention
        type that has no cache, it costs a whole forward pass over what is seen; a window starts anew, half of it back,
        each time it is full, so that segments keep starting where they did. For several texts of one prompt, repeat
        its row.

        Args:
            prompt: token ids (batch, seq >= 1).
            max_new_tokens: how many to append at most, 0 or more.
            key_padding_mask: (batch, seq), bool, True where the prompt is padding, on the right of shorter rows. Each
                row goes on as it would alone; rows of one length go through the attention together.
            temperature: divides the logits; 0 takes the likeliest token.
            top_k: sample among the k likeliest only.
            top_p: sample from the nucleus: the fewest likeliest tokens that hold p of the mass top_k has left.
            min_p: sample among those at least min_p times as likely as the likeliest.
            repetition_penalty: above 1, tokens that the row holds already become less likely, as CTRL's do.
            logits_processor: called as ``processor(tokens, logits)``, after the penalty and before the temperature,
                with what generate would return now and logits (batch, vocab_size) in float32 or float64; returns such
                logits, -inf for what may not come. It changes neither argument.
            eos_token_id: one id or several. A row ends with the first of them it draws; all ended, generation stops.
            pad_token_id: fills what is right of a row's end; the first eos_token_id where None.
            window: most tokens to look back on; all of them where None.
            generator: source of randomness on the prompt's device, for samples that can be repeated.

        Returns:
            Token ids (batch, seq + steps), in the prompt's dtype, steps the most tokens that a row got. Each row's new
            tokens follow its own last one; padding is on the right.

        Raises:
            TypeError, ValueError: an argument is out of its range, named; a token id is outside the vocabulary.

        >>> from dilated_factory.models import LongNetLM
        >>> model = LongNetLM(256, 32, 4, 1, [16], [1])
        >>> model.generate(torch.zeros(1, 3, dtype=torch.int64), 5, temperature=0).shape
        torch.Size([1, 8])
        """
        new = list(
            self.stream(
                prompt,
                max_new_tokens,
                key_padding_mask=key_padding_mask,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                repetition_penalty=repetition_penalty,
                logits_processor=logits_processor,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
                window=window,
                generator=generator,
            )
        )
        if key_padding_mask is None:
            return torch.cat((prompt, *new), dim=1)
        pad = _fill(_ids("eos_token_id", eos_token_id, self.vocab_size), pad_token_id)
        text = prompt.masked_fill(key_padding_mask, pad)
        if not new:
            return text
        text = torch.cat((text, text.new_full((text.shape[0], len(new)), pad)), dim=1)
        first = (~key_padding_mask).sum(1, keepdim=True)
        return text.scatter_(1, first + torch.arange(len(new), device=text.device), torch.cat(new, dim=1))

    def stream(
        self,
        prompt: Tensor,
        max_new_tokens: int,
        *,
        key_padding_mask: Tensor | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        logits_processor: LogitsProcessor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        window: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens of ``generate`` as they come.

        Arguments are generate's, and are checked at the call. Between tokens the model is in its own mode, and nothing
        of the caller's is changed; autocast is as it was at the call.

        Returns:
            An iterator of ids (batch, 1), in the prompt's dtype, which may be left at any point. A row that has ended
            yields pad_token_id.

        Raises:
            TypeError, ValueError: as ``generate``.

        >>> from dilated_factory.models import LongNetLM
        >>> model = LongNetLM(256, 32, 4, 1, [16], [1])
        >>> [ids.shape for ids in model.stream(torch.zeros(1, 3, dtype=torch.int64), 2)]
        [torch.Size([1, 1]), torch.Size([1, 1])]
        """
        check_tokens("prompt", prompt)
        lengths = _lengths(prompt, key_padding_mask)
        for name, number, least in (("max_new_tokens", max_new_tokens, 0), ("window", window, 2)):
            if name == "window" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int):
                raise TypeError(f"{name}: expected an int, got {number!r} of type {type(number).__name__}")
            if number < least:
                few = "0 or more" if least == 0 else f"at least {least} tokens"
                raise ValueError(f"{name}: expected {few}, got {number}")
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
        if top_k is not None and top_k > self.vocab_size:
            raise ValueError(f"top_k: expected 1 to vocab_size={self.vocab_size}, got {top_k}")
        if logits_processor is not None and not callable(logits_processor):
            raise TypeError(f"logits_processor: expected a callable or None, got {type(logits_processor).__name__}")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator or None, got {type(generator).__name__}")
        ends = _ids("eos_token_id", eos_token_id, self.vocab_size)
        if pad_token_id is not None:
            _ids("pad_token_id", pad_token_id, self.vocab_size)
        if min(lengths, default=prompt.shape[1]) < prompt.shape[1] and pad_token_id is None and not ends:
            raise ValueError(
                "pad_token_id: expected an id, to fill shorter rows where there is no eos_token_id, got None"
            )
        pad = _fill(ends, pad_token_id)
        text = Text(prompt, lengths, pad)
        ids = text.ids
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.vocab_size:
            raise ValueError(
                f"prompt: expected ids in [0, {self.vocab_size}), got [{int(ids.min())}, {int(ids.max())}]"
            )
        autocast = Autocast.now(prompt.device.type)
        decoder = None if window is not None else cached(self, text, autocast)
        return self._steps(
            text,
            WholePasses(self, text, window) if decoder is None else decoder,
            sampling,
            Ending(ends, pad, text),
            logits_processor,
            generator,
            max_new_tokens,
            autocast,
        )

    def _steps(
        self,
        text: Text,
        decoder: Decoder,
        sampling: Sampling,
        ending: Ending,
        logits_processor: LogitsProcessor | None,
        generator: torch.Generator | None,
        max_new_tokens: int,
        autocast: Autocast,
    ) -> Iterator[Tensor]:
        seen = None if sampling.repetition_penalty == 1.0 else text.seen(self.vocab_size)
        for _ in range(max_new_tokens):
            # Left before each yield: what happens between tokens is the caller's.
            with torch.no_grad(), uncompiled(), evaluating(self), autocast.again():
                logits = decoder.next_logits(ending.rows)
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                if seen is not None:
                    logits = sampling.penalised(logits, seen)
                if logits_processor is not None:
                    logits = _processed(logits_processor, text.now, logits)
                chosen = ending.apply(sampling.choose(logits, generator).to(text.ids.dtype))
                text.append(chosen)
                if seen is not None:
                    seen.scatter_(1, chosen.long(), True)
            yield chosen
            if ending.all:
                return


def check_tokens(name: str, tokens: object) -> None:
    """Raise TypeError or ValueError unless tokens is an integer tensor (batch, seq)."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in _ID_DTYPES:
        found = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name}: expected int64 or int32 token ids, got {found}")
    if tokens.ndim != 2:
        raise ValueError(f"{name}: expected (batch, seq), got {tuple(tokens.shape)}")


def _lengths(prompt: Tensor, mask: object) -> list[int]:
    """Tokens of each row. Raises TypeError or ValueError where a row has none, or padding that is not on its right."""
    if prompt.shape[1] < 1:
        raise ValueError("prompt: expected at least one token a row, got none")
    if mask is None:
        return [prompt.shape[1]] * prompt.shape[0]
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        found = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"key_padding_mask: expected a bool tensor, got {found}")
    if mask.shape != prompt.shape or mask.device != prompt.device:
        raise ValueError(
            f"key_padding_mask: expected (batch, seq) = {tuple(prompt.shape)} on {prompt.device}, "
            f"got {tuple(mask.shape)} on {mask.device}"
        )
    counts = (~mask).sum(1)
    on_the_right = (mask == (torch.arange(mask.shape[1], device=mask.device) >= counts[:, None])).all(1).tolist()
    if not all(on_the_right):
        row = on_the_right.index(False)
        raise ValueError(f"key_padding_mask: expected padding on the right only, got some before a token in row {row}")
    lengths: list[int] = counts.tolist()
    if 0 in lengths:
        raise ValueError(f"key_padding_mask: expected at least one token a row, got none in row {lengths.index(0)}")
    return lengths


def _ids(name: str, value: object, vocab_size: int) -> tuple[int, ...]:
    """One id or several, as a tuple; () for None. Raises TypeError or ValueError."""
    if value is None:
        return ()
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and name == "eos_token_id"
    ids: tuple[object, ...] = tuple(value) if several else (value,)  # type: ignore[arg-type]
    if not ids:
        raise ValueError(f"{name}: expected an id, several or None, got an empty sequence")
    checked = []
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int):
            raise TypeError(f"{name}: expected a token id, an int, got {one!r} of type {type(one).__name__}")
        if not 0 <= one < vocab_size:
            raise ValueError(f"{name}: expected an id in [0, {vocab_size}), got {one}")
        checked.append(one)
    return tuple(checked)


def _fill(ends: Sequence[int], pad_token_id: int | None) -> int:
    """What stands where a row has ended; any id where none can."""
    return (ends[0] if ends else 0) if pad_token_id is None else pad_token_id


def _processed(processor: LogitsProcessor, tokens: Tensor, logits: Tensor) -> Tensor:
    """What the processor makes of the logits. Raises TypeError or ValueError where no token can be chosen from it."""
    processed: object = processor(tokens, logits)
    if not isinstance(processed, Tensor):
        raise TypeError(f"logits_processor: expected it to return a tensor, got {type(processed).__name__}")
    if processed.shape != logits.shape or not processed.is_floating_point():
        raise ValueError(
            f"logits_processor: expected it to return floating-point logits {tuple(logits.shape)}, "
            f"got {processed.dtype} {tuple(processed.shape)}"
        )
    if not bool(processed.amax(-1).isfinite().all()):
        raise ValueError("logits_processor: expected a finite largest logit in every row, got -inf, inf or NaN")
    return processed.to(logits.dtype)
