"""Which size each picture is brought to, and what of that a user should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adapterkit.training.data_files import listed
from adapterkit.training.pictures.buckets import Frame
from adapterkit.training.pictures.dataset import Example
from adapterkit.training.pictures.latents import Shot
from adapterkit.training.pictures.options import PictureOptions
from adapterkit.training.pictures.survey import Picture
from adapterkit.training.sizes import Size

_CUT = 0.01  # of which nobody needs to be told
_SHOWN = 8


@dataclass(frozen=True)
class Plan:
    """Pictures and the frames that they are laid into."""

    pictures: Sequence[Picture]
    frames: Sequence[Frame]
    options: PictureOptions

    @classmethod
    def of(
        cls,
        pictures: Sequence[Picture],
        options: PictureOptions,
        size: Size,
        multiple: int,
        longest: int | None = None,
    ) -> Plan:
        """For a model.

        Args:
            pictures: What there is.
            options: How it is brought to sizes.
            size: Height and width that are asked for, or that the model was made for.
            multiple: Of sides in pixels, which the model needs.
            longest: Side in pixels that the model takes.

        Raises:
            ConfigError: The options do not fit the model.
        """
        buckets = options.buckets_of(size, multiple, longest)
        return cls(pictures, [Frame(picture.size, buckets.of(picture.size)) for picture in pictures], options)

    def examples(self) -> list[Example]:
        """The pictures with their looks."""
        return [self._example(picture, frame) for picture, frame in zip(self.pictures, self.frames, strict=True)]

    def _example(self, picture: Picture, frame: Frame) -> Example:
        looks = self.options.variety(picture.concept).looks(frame, picture.key)
        return Example(picture, [Shot(picture, look) for look in looks])

    def small_sizes(self, batch: int) -> str:
        """Sizes with fewer examples than a batch; empty where there are none, and where all are of one size."""
        counts: Counter[Size] = Counter()
        for picture, frame in zip(self.pictures, self.frames, strict=True):
            counts[frame.size] += picture.repeats
        small = [f"{width} x {height}" for (height, width), count in counts.items() if count < batch]
        return listed(small) if small and len(counts) > 1 else ""

    def facts(self) -> dict[str, str]:
        """Pictures by concept and by size, and what is cut or enlarged; nothing of what there is none of."""
        told = {
            **self._counts(),
            "sizes": self._sizes(),
            "cut to their sizes": self._cut(),
            "enlarged": self._enlarged(),
        }
        return {name: value for name, value in told.items() if value}

    def _counts(self) -> dict[str, str]:
        if len(self.options.folders()) == 1 and not any(picture.repeats > 1 for picture in self.pictures):
            return {}
        shown: dict[tuple[str, bool], Counter[str]] = {}
        for picture in self.pictures:
            of = picture.concept
            shown.setdefault((of.folder, of.prior), Counter()).update(pictures=1, examples=picture.repeats)
        told = {
            key: (_many(count["pictures"], "picture"), _many(count["examples"], "example"))
            for key, count in shown.items()
        }
        return {f"{folder}{' (prior)' * prior}": ", ".join(counts) for (folder, prior), counts in told.items()}

    def _sizes(self) -> str:
        counts = Counter(frame.size for frame in self.frames)
        if len(counts) < 2:
            return ""
        told = [f"{width} x {height} ({count})" for (height, width), count in counts.most_common()]
        return f"{', '.join(told[:_SHOWN])}{f' and {len(told) - _SHOWN} more' * (len(told) > _SHOWN)}"

    def _cut(self) -> str:
        cut = sorted(((frame.cut, name) for name, frame in self._named() if frame.cut > _CUT), reverse=True)
        if not cut:
            return ""
        told = listed([f"{name} {share:.0%}" for share, name in cut])
        return f"by {sum(share for share, _ in cut) / len(cut):.0%} on average, {told}"

    def _enlarged(self) -> str:
        scales = sorted(((frame.scale, name) for name, frame in self._named() if frame.scale > 1), reverse=True)
        return listed([f"{name} {scale:.2g} times" for scale, name in scales]) if scales else ""

    def _named(self) -> Iterator[tuple[str, Frame]]:
        for picture, frame in zip(self.pictures, self.frames, strict=True):
            yield picture.path.name, frame


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"
