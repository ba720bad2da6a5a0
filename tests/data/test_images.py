"""Images: folders, tables and the digits; what augments them; what is said of damaged ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import _listing, images
from engine.config import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLAINLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 images of two classes, 20 x 16 pixels: a class has the colour of its name."""
    for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        for number in range(6):
            file = tmp_path / "all" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 16), tuple(value + number for value in colour)).save(file)
    return tmp_path / "all"


def config(folder: Path | None, **more: object) -> images.Config:
    return images.Config(name="images", train=str(folder or ""), root="/", **more)


def whole(dataset: images.Images) -> dict[str, torch.Tensor]:
    return dataset.__getitems__(torch.arange(len(dataset)))


def test_a_folder_by_class(folder: Path) -> None:
    splits = images.load(config(folder))
    assert splits.info.labels == ["blue", "red"] and splits.info.kind == "binary" and splits.info.more == {"image": [3, 16, 16]}
    parts = [whole(part) for part in (splits.train, splits.valid, splits.test)]
    assert sum(len(part["image"]) for part in parts) == 12
    for part in parts:
        red = part["image"][:, 0].mean((1, 2)) > 0.5
        assert torch.equal(red, part["target"].bool())
        assert part["image"].shape[1:] == (3, 16, 16) and part["image"].dtype == torch.float32


def test_a_table_gives_the_same_and_is_decoded_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = folder.parent / "table.csv"
    rows = [f"all/{name}/{number}.png,{name}" for name in ("blue", "red") for number in range(6)]
    table.write_text("\n".join(["path,label", *rows]))
    first, second = (images.load(config(source)) for source in (folder, table))
    assert torch.equal(whole(first.valid)["image"], whole(second.valid)["image"])
    assert len(list(cache.glob("[!.]*"))) == 1
    monkeypatch.setattr(images, "decode", lambda file, *_: pytest.fail("decoded again"))
    assert torch.equal(whole(images.load(config(table, size=16, colour="rgb")).valid)["image"], whole(first.valid)["image"])


def test_digits_are_the_default() -> None:
    splits = images.load(config(None))
    image = whole(splits.test)["image"]
    assert splits.info.outputs == 10 and image.shape[1:] == (1, 8, 8) and image.min() == 0 and image.max() == 1


def test_sixteen_bits_of_grey_are_those_of_eight(tmp_path: Path) -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    Image.fromarray(grey).save(tmp_path / "narrow.png")
    assert (images.decode(tmp_path / "wide.png") == images.decode(tmp_path / "narrow.png")).all()


def test_a_seed_is_not_another_one_of_a_later_position() -> None:
    one, other = (_listing.shares(torch.arange(1000), seed, 5) for seed in (0, 5))
    assert not np.isin(one, other).any()
    assert abs(one.mean() - 0.5) < 0.02


def test_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    splits = images.load(config(None, crop=2, flip=0.5, jitter=0.3))
    again, plain = images.load(config(None, crop=2, flip=0.5, jitter=0.3)), images.load(config(None))
    length, positions = len(splits.train), torch.arange(64)
    batch = splits.train.__getitems__(positions)["image"]
    assert torch.equal(batch[10:20], again.train.__getitems__(positions[10:20])["image"])
    other = images.load(config(None, crop=2, flip=0.5, jitter=0.3, augment_seed=1)).train.__getitems__(positions)["image"]
    for changed in (splits.train.__getitems__(positions + length)["image"], other, plain.train.__getitems__(positions)["image"]):
        assert ((changed - batch).flatten(1).abs().max(1).values > 0).float().mean() > 0.9
    assert torch.equal(whole(splits.valid)["image"], whole(plain.valid)["image"])


def test_what_flips_and_crops_do() -> None:
    rows = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    flipped = images.augmented(rows, torch.tensor([0]), config(None, flip=1.0))
    assert np.array_equal(flipped, rows[..., ::-1])
    shifted = images.augmented(np.repeat(rows, 500, 0), torch.arange(500), config(None, crop=1))
    kinds = {image.tobytes() for image in shifted}
    assert len(kinds) == 9 and rows.tobytes() in kinds


def test_a_new_folder_is_read_like_the_training_images(folder: Path) -> None:
    settings = config(folder)
    splits = images.load(settings)
    (rows,) = images.read_rows(folder, settings, splits.preprocessing, splits.info)
    assert rows.labelled and rows.ids == {"row": list(range(12))} and len(rows.dataset) == 12
    (flat,) = images.read_rows(folder / "red", settings, splits.preprocessing, splits.info)
    assert not flat.labelled and torch.equal(whole(flat.dataset)["image"], whole(rows.dataset)["image"][6:])


def test_bad_images_name_their_row(folder: Path) -> None:
    good = (folder / "red" / "2.png").read_bytes()
    (folder / "red" / "2.png").write_bytes(good[: len(good) // 2])
    (folder / "blue" / "5.png").write_text("no image")
    with pytest.raises(UserError, match=r'row 6: .*blue/5.png: cannot be read as an image.*\(1 more rows are bad\).*data.on_bad = "skip"'):
        images.load(config(folder))
    skipped = images.load(config(folder, on_bad="skip"))
    assert sum(map(len, (skipped.train, skipped.valid, skipped.test))) == 10
    assert any("skipped 2 bad rows" in note for note in skipped.notes)
    for part in (skipped.train, skipped.valid, skipped.test):
        assert torch.equal(whole(part)["image"][:, 0].mean((1, 2)) > 0.5, whole(part)["target"].bool())
    with pytest.raises(UserError, match=r"row 6: .*blue/5.png"):
        next(images.read_rows(folder, config(folder), {"image": [3, 16, 16]}, skipped.info))
    (rows,) = images.read_rows(folder, config(folder, on_bad="skip"), {"image": [3, 16, 16]}, skipped.info)
    assert rows.ids["row"] == [0, 1, 2, 3, 4, 6, 7, 9, 10, 11]


def test_other_mistakes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\n" + "all/red/0.png,a\nall/none.png,b\n" * 10)
    for given, said in (
        (config(tmp_path / "t.csv"), "row 2: .*all/none.png: no such file"),
        (config(tmp_path / "t.csv", file="file"), "data.file = 'file': .* no such column"),
        (config(folder / "red"), "lies in no folder of a class"),
        (config(tmp_path / "absent"), "no such file"),
    ):
        with pytest.raises(UserError, match=said):
            images.load(given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image lies in this folder"):
        images.load(config(tmp_path / "empty"))
