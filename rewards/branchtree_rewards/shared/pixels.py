"""From samples to what a vision encoder takes. Axis letters: B samples, C channels, H height, W width, S side.

Rewards see 8-bit pictures, as they do when a picture is scored from its file: training and evaluation then agree, with
each other and with the public trainers. Public preprocessing resizes with PIL in some rewards and on float tensors in
others; the results differ by more than the last digit, so each reward names the one that its publisher uses.
"""

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def to_uint8(pixels: Tensor) -> Tensor:
    """Return samples in [0, 1] as rounded bytes of the same shape."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8)


def to_rgb(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) of 1, 3 or 4 channels as (B, 3, H, W), without a fourth one. Raises ValueError."""
    channels = images.shape[1]
    if channels not in {1, 3, 4}:
        raise ValueError(f"images must have 1, 3 or 4 channels, not {channels}")
    return images.expand(-1, 3, -1, -1) if channels == 1 else images[:, :3]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return images (B, C, H, W) in [0, 1] as 8-bit RGB pictures."""
    arrays = to_uint8(to_rgb(images)).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def from_pil(images: list[Image.Image]) -> Tensor:
    """Return pictures of one size as float (B, 3, H, W) in [0, 1], on the CPU."""
    from torchvision.transforms.functional import pil_to_tensor

    return torch.stack([pil_to_tensor(image.convert("RGB")) for image in images]).float() / 255


def clip_pixels(images: Tensor, size: int, *, floor: bool = False) -> Tensor:
    """Return images (B, C, H, W) in [0, 1] as CLIP and BLIP take them, (B, 3, S, S), on their device.

    ``size`` is the side S in pixels; for ``floor`` see `shortest_side_crop`.
    """
    pictures = [shortest_side_crop(picture, size, floor=floor) for picture in to_pil(images)]
    return normalised(from_pil(pictures).to(images.device))


def shortest_side_crop(image: Image.Image, size: int, *, floor: bool = False) -> Image.Image:
    """Resize the shorter side to ``size`` with PIL's bicubic, then cut the middle ``size`` x ``size`` out.

    torchvision's Resize and CenterCrop on a PIL image round where the cut begins half-way between two pixels. Under
    ``floor`` it begins at the lower one, which is, to the bit, transformers' CLIPImageProcessor (in 5,
    CLIPImageProcessorPil). The two differ by one pixel where 3, 7, 11, ... more than ``size`` are left: at 640 x 427,
    say.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    resized: Image.Image = vision.resize(image, size, InterpolationMode.BICUBIC)
    if not floor:
        cut: Image.Image = vision.center_crop(resized, size)
        return cut
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def normalised(images: Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD) -> Tensor:
    """Return images (B, 3, H, W) in [0, 1] with each channel centred and scaled."""
    centre, width = (images.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return (images - centre) / width


def shrunk(images: Tensor, size: int) -> Tensor:
    """Shrink images (N, C, H, W) by averages until the longer side is at most ``size`` pixels; smaller ones pass."""
    height, width = images.shape[-2:]
    if max(height, width) <= size:
        return images
    scale = size / max(height, width)
    return functional.adaptive_avg_pool2d(images, (max(round(height * scale), 1), max(round(width * scale), 1)))
