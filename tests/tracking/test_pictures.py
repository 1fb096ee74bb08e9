import numpy as np
import pytest
import torch
from PIL import Image

from dvae.tracking.pictures import grid


def test_cells_lie_row_by_row_with_transparent_gaps(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2) * 10
    grid(images, tmp_path / "grid.png", columns=3, scale=2, pad=1)
    sheet = np.asarray(Image.open(tmp_path / "grid.png"))
    assert sheet.shape == (2 * 4 + 1, 3 * 4 + 2, 4)
    assert (sheet[:4, 5:9, :3] == 10).all()  # second cell, each pixel 2 x 2
    assert (sheet[5:, :4] == [30, 30, 30, 255]).all()
    assert (sheet[:, 4, 3] == 0).all()  # gap
    assert (sheet[5:, 10:, 3] == 0).all()  # the sixth cell is empty


def test_gray_images_and_fewer_than_a_row(tmp_path):
    grid(torch.full((2, 1, 4, 4), 7, dtype=torch.uint8), tmp_path / "new" / "grid.png")
    sheet = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert sheet.shape == (4, 9, 4)
    assert (sheet[:, :4] == [7, 7, 7, 255]).all()


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)])
def test_other_tensors_are_refused(tmp_path, images):
    with pytest.raises(ValueError, match="uint8"):
        grid(images, tmp_path / "grid.png")
