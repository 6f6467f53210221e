"""Data sources whose records have something from a store of their own beside them: captions, or features.

A store belongs to images; latents have what their images have.
"""

from typing import Any


class JoinedSource:
    """A data source with a store beside it: subclasses say by `_beside` what a record has from that, too.

    All else is the source's, except for the fingerprint: with another store the data are others.

    Args:
      source: the source.
      store: has a `checksum`.
    """

    def __init__(self, source: Any, store: Any):
        self._source, self._store = source, store

    def __getattr__(self, name: str) -> Any:
        if name == "_source":  # not there yet, while a copy is being made
            raise AttributeError(name)
        return getattr(self._source, name)

    @property
    def fingerprint(self) -> str:
        return f"{self._source.fingerprint}+{self._store.checksum}"

    @property
    def older_fingerprints(self) -> tuple[str, ...]:
        return tuple(f"{older}+{self._store.checksum}" for older in self._source.older_fingerprints)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._source[index]
        # Another image stands in for a broken one, with what is its own.
        broken = getattr(self._source, "broken", ())
        while index in broken:
            index = (index + 1) % len(self)
        return record | self._beside(index)

    def _beside(self, index: int) -> dict[str, Any]:
        raise NotImplementedError


def alone(source: Any) -> Any:
    """The source without the stores beside it."""
    while isinstance(source, JoinedSource):
        source = source._source
    return source


def images_of(source: Any) -> dict[str, Any]:
    """{"fingerprint", "shape"} of a source's images: of latents, those that they were made of, where the latents say so."""
    of = source.header.get("images", {}) if source.encoded_by else {}
    return {"fingerprint": of.get("fingerprint", source.fingerprint), "shape": of.get("shape", source.image_shape)}
