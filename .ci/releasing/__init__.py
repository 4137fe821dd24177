"""What a release rests on: versions, changelogs and tags that agree, whole archives, and sets that install together."""
