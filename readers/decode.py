"""Converting images of any format and size to the size and channels of training."""

import contextlib
import dataclasses
import io
import threading
from typing import Any

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
IMAGE_SUFFIXES = tuple(
    suffix for suffix, kind in Image.registered_extensions().items() if kind in _FORMATS
)
MAX_PIXELS = 2**26
_LARGE, _one_large = 2**24, threading.Lock()  # larger images are converted one at a time
_TURNS: dict[Any, Image.Transpose] = {  # by the EXIF tag Orientation
    number: Image.Transpose(turn) for number, turn in enumerate((0, 3, 1, 5, 4, 6, 2), start=2)
}

# Pillow refuses PNGs with more than 1 MiB of text or colour profile.
PngImagePlugin.MAX_TEXT_CHUNK = MAX_PIXELS


def is_image_name(name: str) -> bool:
    """Whether a file's name has the suffix of a supported image format."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _turned(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(0x0112))
    except Exception:  # Pillow raises many kinds of error for damaged EXIF data
        turn = None
    return image if turn is None else image.transpose(turn)


def _flatten(image: Image.Image) -> Image.Image:
    """The image as viewers show it: turned by its EXIF data, on white, with 8 bits a channel."""
    if has_16_bits(image):  # which PIL would clip at 255
        pixels, clear = np.asarray(_turned(image), np.uint32), image.info.get("transparency")
        pixels = np.where(pixels == clear, 2**16 - 1, pixels) if isinstance(clear, int) else pixels
        return Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its mode is {image.mode}, 32 bits a pixel; 8 and 16 bits are read, and other values "
            "as arrays, by configs/vp/array_st.py"
        )
    image = _turned(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _centre(image: Image.Image, side: int) -> Image.Image:
    """The square at an image's centre, black where the image does not reach."""
    left, top = int((image.width - side) / 2), int((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


@dataclasses.dataclass(frozen=True)
class Fit:
    """Converts an image to size × size pixels: crops its centre and resizes it, or pads it.

    Attributes:
      size: side of the result in pixels.
      channels: channels of the result, 1 (grey) or 3 (RGB).
      crop: side of the centre crop in pixels; for 0 and for smaller images, the largest square.
      resampling: PIL's filter.
      pad: pad smaller images with black instead of resizing them.
      max_pixels: images with more are not opened.
    """

    size: int
    channels: int
    crop: int = 0
    resampling: Image.Resampling = Image.Resampling.BICUBIC
    pad: bool = False
    max_pixels: int = MAX_PIXELS

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The image as (size, size, channels) uint8; ValueError if it has 32 bits a pixel."""
        is_large = image.width * image.height > _LARGE
        with _one_large if is_large else contextlib.nullcontext():
            return self._fitted(image)

    def _fitted(self, image: Image.Image) -> np.ndarray:
        image = _flatten(image).convert("L" if self.channels == 1 else "RGB")
        if 0 < self.crop <= min(image.size):
            image = _centre(image, self.crop)
        if self.pad and max(image.size) <= self.size:
            image = _centre(image, self.size)
        elif image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size), self.resampling)
        return np.asarray(image, np.uint8).reshape(self.size, self.size, self.channels)

    def batch(self, images: np.ndarray) -> np.ndarray | None:
        """Images (n, H, W, C), unchanged or padded; None if each must be converted by itself."""
        height, width, channels = images.shape[1:]
        uncropped = self.crop == 0 or self.crop >= self.size
        if images.shape[1:] == (self.size, self.size, self.channels) and uncropped:
            return images
        if not self.pad or max(height, width) > self.size or channels != self.channels:
            return None
        rows, columns = self.size - height, self.size - width
        padding = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
        return np.pad(images, ((0, 0), *padding, (0, 0)))


def open_image(data: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an encoded image, which is not decoded yet, or an array (H, W) or (H, W, C) uint8.

    Raises:
      ValueError: it has more than `max_pixels`, or no format that is read.
      Exception: any other error that PIL raises for damaged data.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data)
    Image.MAX_IMAGE_PIXELS = max(max_pixels, Image.MAX_IMAGE_PIXELS or 0)
    too_large = ValueError(f"it has more pixels than data.max_pixels={max_pixels}")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise ValueError("it has no image format that is read") from error
    except Image.DecompressionBombError as error:
        raise too_large from error
    if image.width * image.height > max_pixels:
        raise too_large
    return image


def has_16_bits(image: Image.Image) -> bool:
    """Whether an image has one channel of 16 bits."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def is_grey(image: Image.Image) -> bool:
    """Whether an image's mode has no colours."""
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")
