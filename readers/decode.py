"""Converting images of any format and size to the size and channels of training."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def is_image_name(name: str) -> bool:
    """Whether a file's name has the suffix of a supported image format."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _flatten(image: Image.Image) -> Image.Image:
    """The image as viewers show it: rotated by its EXIF data, on white, with 8 bits a channel."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits a pixel, which PIL would clip at 255
        return Image.fromarray((np.asarray(image, np.uint32) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


@dataclasses.dataclass(frozen=True)
class Fit:
    """Converts an image to size × size pixels: crops its centre and resizes it, or pads it.

    Attributes:
      size: side of the result in pixels.
      channels: channels of the result, 1 (grey) or 3 (RGB).
      crop: side of the centre crop in pixels; for 0 and for smaller images, the largest square.
      resampling: PIL's filter.
      pad: pad smaller images with black instead of resizing them.
    """

    size: int
    channels: int
    crop: int = 0
    resampling: Image.Resampling = Image.Resampling.BICUBIC
    pad: bool = False

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The image as (size, size, channels) uint8."""
        image = _flatten(image).convert("L" if self.channels == 1 else "RGB")
        if 0 < self.crop <= min(image.size):
            left, top = (image.width - self.crop) // 2, (image.height - self.crop) // 2
            image = image.crop((left, top, left + self.crop, top + self.crop))
        if self.pad and max(image.size) <= self.size:
            left, top = (self.size - image.width) // 2, (self.size - image.height) // 2
            image = ImageOps.expand(
                image,
                (left, top, self.size - image.width - left, self.size - image.height - top),
            )
        elif image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size), self.resampling)
        return np.asarray(image, np.uint8).reshape(self.size, self.size, self.channels)

    def leaves_alone(self, shape: tuple[int, ...]) -> bool:
        """Whether an image array (H, W, C) of this shape is returned unchanged."""
        uncropped = self.crop == 0 or self.crop >= self.size
        return shape == (self.size, self.size, self.channels) and uncropped

    def batch(self, images: np.ndarray) -> np.ndarray | None:
        """Images (n, H, W, C), unchanged or padded; None if each must be converted by itself."""
        height, width, channels = shape = images.shape[1:]
        if self.leaves_alone(shape):
            return images
        if not self.pad or max(height, width) > self.size or channels != self.channels:
            return None
        rows, columns = self.size - height, self.size - width
        padding = ((rows // 2, rows - rows // 2), (columns // 2, columns - columns // 2))
        return np.pad(images, ((0, 0), *padding, (0, 0)))


def open_image(data: bytes | np.ndarray) -> Image.Image:
    """Open an encoded image (PNG, JPEG, WebP, BMP), or an array (H, W) or (H, W, C) uint8.

    Raises:
      Exception: any error that PIL raises for damaged data.
    """
    if isinstance(data, np.ndarray):
        return Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data)
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def is_grey(image: Image.Image) -> bool:
    """Whether an image's mode has no colours."""
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")
