"""--item_table=pq: item vectors of shared sub-vectors, and the codes that say which."""

import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import make_dataset
from launch import MAIN, TINY, here, read_state, torchrun, write_csv
from test_losses import NewTensors

from model import SequenceRecommender
from reclm.adapt.quantize import num_bytes
from reclm.config import LossConfig, ModelConfig, TrainConfig, build_config
from reclm.data.dataset import Vocabulary
from reclm.errors import UserError
from reclm.nn import pq
from reclm.nn.losses import LOSSES, Excluded, exclude_negatives, score_items
from reclm.nn.pq import PQEmbedding, assign_codes, choose_centroids, item_factors
from reclm.run.optim import build_optimizer
from reclm.serve import Recommender, small_tables
from reclm.serve.small_tables import PQTable
from reclm.serve.top_k import top_k

SETTINGS = {"dim": 16, "n_heads": 2, "n_layers": 1, "max_len": 12, "dropout": 0.0}
PQ = SETTINGS | {"item_table": "pq", "pq_codes": 4, "pq_centroids": 8}
ITEMS = 40


def table(num_items=ITEMS, **changes) -> PQEmbedding:
    """A table with random codes and sub-vectors, in float64."""
    torch.manual_seed(0)
    made = PQEmbedding(num_items + 1, ModelConfig(**PQ | changes)).double()
    made.codes.random_(0, made.num_centroids)
    return made


def concatenated(items: PQEmbedding) -> torch.Tensor:
    """(V, D) by the definition, one sub-vector after the other."""
    rows = []
    for item, codes in enumerate(items.codes.tolist()):
        parts = [items.weight[j * items.num_centroids + code] for j, code in enumerate(codes)]
        rows.append(torch.cat(parts) * (item > 0))
    return torch.stack(rows)


def test_a_vector_is_the_concatenation_of_its_sub_vectors():
    items = table()
    expected = concatenated(items)
    ids = torch.tensor([[1, 7, 0], [7, ITEMS, 3]])
    assert torch.equal(items(ids), expected[ids]) and torch.equal(items.dense(), expected)
    assert not items(ids)[0, 2].any() and items.weight.shape == (4 * 8, 4)


def test_scores_are_those_of_the_dense_product(monkeypatch):
    monkeypatch.setattr(pq, "ITEMS_AT_ONCE", 7)  # so that they come in pieces
    items, hidden = table().float(), torch.randn(5, 16)
    for rows in (hidden, hidden[:1]):
        torch.testing.assert_close(score_items(rows, items), rows @ items.dense().T, atol=1e-5, rtol=1e-5)


def positions(count=300):
    """hidden, targets, negatives and what is excluded, for the losses"""
    torch.manual_seed(1)
    hidden = torch.randn(count, 16, dtype=torch.double)
    targets, negatives = torch.randint(1, ITEMS + 1, (count,)), torch.randperm(ITEMS)[:9] + 1
    excluded = Excluded(torch.randint(0, ITEMS + 1, (3, 6)), torch.arange(count) % 3, torch.tensor([2, 5]))
    return hidden, targets, negatives, excluded


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("leaves_out", [False, True])
def test_losses_and_gradients_are_those_of_the_vectors(loss, leaves_out):
    """Against the same loss of the concatenated table, differentiated by torch."""
    hidden, targets, negatives, excluded = positions()
    excluded = excluded if leaves_out else None
    if loss != "softmax":
        excluded = exclude_negatives(negatives, targets, excluded)
    found = []
    for expand in (concatenated, lambda items: items):
        items, own = table(), hidden.clone().requires_grad_()
        total = LOSSES[loss](own, expand(items), targets, negatives, excluded)
        (3 * total).backward()
        found.append((total, own.grad, items.weight.grad))
    assert found[0][2].abs().max() > 0
    torch.testing.assert_close(*found)


def models():
    """A model with the table, and a dense one with the vectors that it stands for."""
    torch.manual_seed(0)
    model = SequenceRecommender(ModelConfig(**PQ), LossConfig(loss="softmax"), Vocabulary(ITEMS, 3))
    model.item_embedding.codes.random_(0, 8)
    dense = SequenceRecommender(ModelConfig(**SETTINGS), LossConfig(loss="softmax"), Vocabulary(ITEMS, 3))
    others = {name: weight for name, weight in model.state_dict().items() if "item_embedding" not in name}
    dense.load_state_dict(others | {"item_embedding.weight": model.item_embedding.dense()})
    return model, dense


def batch(rows=4, width=9):
    ids = torch.randint(1, ITEMS + 1, (rows, width), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([width, 3, 5, 1])[:rows]
    ids *= torch.arange(width) < lengths[:, None]
    return {"item_ids": ids, "lengths": lengths, "user_ids": torch.zeros(rows, dtype=torch.long)}


def test_the_model_is_that_of_the_vectors():
    model, dense = models()
    assert model.item_embedding.weight.std().item() == pytest.approx(16**-0.5, rel=0.15)  # rows of length 1
    inputs = batch()
    torch.testing.assert_close(model(inputs), dense(inputs), atol=1e-5, rtol=1e-5)
    inputs["targets"] = inputs["item_ids"].roll(-1, 1) * (inputs["item_ids"] > 0)
    torch.testing.assert_close(model(inputs), dense(inputs), atol=1e-4, rtol=1e-5)
    assert "item_embedding.codes" in model.state_dict() and "codes" not in str(dense.state_dict().keys())


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "softmax"])
def test_a_step_makes_nothing_with_a_row_per_item(loss):
    num_items = 20_000
    cfg = ModelConfig(**PQ | {"pq_centroids": 64})
    model = SequenceRecommender(cfg, LossConfig(loss=loss), Vocabulary(num_items, 3))
    optimizer = build_optimizer(model, TrainConfig())
    inputs = batch() | {"negatives": torch.randperm(num_items)[:50] + 1}
    inputs["targets"] = inputs["item_ids"]
    model(inputs).backward()
    optimizer.step()
    optimizer.zero_grad()
    made = NewTensors(num_items)
    with made:
        model(inputs).backward()
        optimizer.step()
    assert made.shapes == []
    assert id(model.item_embedding.weight) in map(id, optimizer.param_groups[1]["params"])  # as an embedding


@pytest.mark.parametrize(("codes", "centroids"), [(4, 8), (16, 256), (1, 9), (3, 20)])
def test_scores_of_one_person_by_pairs_of_codes(codes, centroids, monkeypatch):
    monkeypatch.setattr(small_tables, "MANY", 0)
    monkeypatch.setattr(small_tables, "LOOKED_UP", 70)
    items = table(300, dim=48, pq_codes=codes, pq_centroids=centroids, n_heads=2).float()
    hidden = np.random.default_rng(0).standard_normal((2, 48), dtype=np.float32)
    scores = PQTable(items).scores(hidden)
    np.testing.assert_allclose(scores, hidden @ items.dense().detach().numpy().T, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 400])
def test_the_best_of_many_persons(k, monkeypatch):
    """Without a (B, V), against all scores, with many ties: as top_k, lower numbers first."""
    monkeypatch.setattr(small_tables, "BLOCK", 16)
    monkeypatch.setattr(small_tables, "ITEMS_AT_ONCE", 64)
    rng, items = np.random.default_rng(0), table(300, pq_codes=2, pq_centroids=4).float()
    items.weight.data.mul_(4).round_().div_(4)  # so that no sum is rounded
    hidden = rng.integers(-4, 5, (7, 16)).astype(np.float32)
    seen = [rng.integers(1, 301, count) for count in (0, 5, 200, 1, 2000, 30)]
    scores = hidden @ items.dense().detach().numpy().T
    left_out = np.union1d([0, 3], np.argsort(-scores[0])[:80])
    seen.append(np.argsort(-scores[6])[:90])  # a block has nothing but these, or they are its best
    scores[:, left_out] = -np.inf
    for row, own in zip(scores, seen, strict=True):
        row[own] = -np.inf
    found = PQTable(items).best(hidden, k, left_out, seen)
    for row, numbers, (chosen, own) in zip(scores, top_k(scores, k), found, strict=True):
        assert chosen.tolist() == numbers.tolist() and own.tolist() == row[numbers].tolist()
    assert len(found[4][0]) < 5


def test_no_best_of_scores_that_are_no_numbers():
    items = table(300).float()
    with pytest.raises(UserError, match="non-finite scores"):
        PQTable(items).best(np.full((5, 16), np.nan, np.float32), 3, np.zeros(1, int), [np.zeros(0, int)] * 5)


# ---------------------------------------------------------------- codes


def clustered(num_users=120, clusters=6, size=20, seed=0):
    """Histories of users who each use items of one cluster, in an order that says nothing."""
    rng = np.random.default_rng(seed)
    starts = 1 + size * rng.integers(0, clusters, num_users)
    return [(start + rng.permutation(size)[:12]).tolist() for start in starts]


def test_codes_are_balanced():
    dataset = make_dataset(clustered(), num_items=120)
    cfg = ModelConfig(**PQ)
    codes = assign_codes(dataset, cfg, seed=0)
    assert codes.shape == (121, 4) and codes.dtype == torch.uint8 and not codes[0].any()
    used = np.unique(dataset.item_ids[dataset.in_training])
    for column in codes[used].T:
        counts = torch.bincount(column.int(), minlength=8)
        assert len(counts) == 8 and counts.max() - counts.min() <= 1
    alike = make_dataset([list(range(1, 41))] * 9)  # all factors are equal
    for data in (dataset, alike):
        assert torch.equal(assign_codes(data, cfg, seed=0), assign_codes(data, cfg, seed=0))


def test_held_out_items_change_no_code():
    """Other validation and test items, the same codes; another training item, other codes."""
    histories = clustered()
    cfg, found = ModelConfig(**PQ), []
    for place in (None, -1, -2, 3):
        changed = [list(items) for items in histories]
        for items in changed:
            if place is not None:
                items[place] = 1 + (items[place] + 50) % 120
        # Each item is used once more, by somebody of whom nothing is held out.
        found.append(assign_codes(make_dataset([*changed, *([i, i] for i in range(1, 121))]), cfg, seed=0))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[3])


def test_similar_items_share_codes():
    codes = assign_codes(make_dataset(clustered(), num_items=120), ModelConfig(**PQ), seed=0)[1:]
    shared = (codes[:, None] == codes).float().mean(-1)  # (120, 120)
    same = torch.arange(120)[:, None] // 20 == torch.arange(120) // 20
    same, other = shared[same & ~torch.eye(120, dtype=bool)].mean(), shared[~same].mean()
    assert same > 2 * other > 0, (same, other)


def test_an_item_without_training_rows_is_where_factors_are_0():
    histories = [[*items, 119, 120] for items in clustered(size=19)]  # 119 and 120 are only held out
    dataset, cfg = make_dataset(histories, num_items=None), ModelConfig(**PQ)
    codes = assign_codes(dataset, cfg, seed=0)
    unused = np.setdiff1d(np.arange(1, dataset.num_items + 1), dataset.item_ids[dataset.in_training])
    assert len(unused) == 2 and torch.equal(*codes[unused])
    assert (codes[unused] > 0).any()


def test_factors_are_singular_vectors():
    """Against LAPACK's, up to their sign; a user who comes back to an item counts once."""
    rng = np.random.default_rng(0)
    dense = np.kron(np.diag([0.9, 0.7, 0.5]), np.ones((20, 10)))  # three groups, one more used than the next
    dense = (rng.random((60, 30)) < dense + 0.02).astype(np.float32)
    users, items = dense.nonzero()
    index = torch.from_numpy(np.stack([[*users, users[0]], [*items, items[0]]]))
    factors = item_factors(index, (60, 30), 3, torch.Generator().manual_seed(0)).numpy()
    _, _, expected = np.linalg.svd(dense, full_matrices=False)
    assert np.abs((factors * expected[:3].T).sum(0)) == pytest.approx(1, abs=1e-3)


def test_fewer_sub_vectors_for_fewer_items():
    sizes = {3: 2, 100: 4, 3_416: 128, 4_095: 128, 4_096: 256, 10**6: 256}
    cfg = ModelConfig(**PQ | {"pq_centroids": 0})
    assert {items: choose_centroids(cfg, items) for items in sizes} == sizes


# ---------------------------------------------------------------- runs

FLAGS = [flag for flag in TINY if "negatives" not in flag]
FLAGS += ["--item_table=pq", "--pq_codes=4", "--pq_centroids=8", "--num_epochs=2", "--loss=softmax"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of one process and one of two, on data that are gone afterwards."""
    cwd = tmp_path_factory.mktemp("pq")
    write_csv(cwd / "actions.csv")
    flags = ["--dataset=actions.csv", *FLAGS]
    here(*flags, "--out_dir=one", cwd=cwd).ok()
    torchrun(2, *flags, "--out_dir=two", cwd=cwd).ok()
    return cwd


def test_two_processes_are_one(runs):
    one, two = (read_state(runs / name / "last.pth")["model"] for name in ("one", "two"))
    assert torch.equal(one["item_embedding.codes"], two["item_embedding.codes"])
    assert one["item_embedding.codes"].any()
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], atol=1e-4, rtol=1e-3)


def test_a_checkpoint_needs_no_data(runs, tmp_path):
    for name in ("best.pth", "histories.npz"):
        shutil.copy(runs / "one" / name, tmp_path / name)
    recommender = Recommender.load(tmp_path / "best.pth")
    state = read_state(runs / "one" / "best.pth")["model"]
    assert torch.equal(recommender.engine.model.item_embedding.codes, state["item_embedding.codes"])
    items, vectors = recommender.catalogue.ids, recommender.engine.table[np.arange(26)]
    person = recommender.person(items[:3])
    best = recommender.recommend(person, 5)
    hidden = recommender.session(person).hidden
    scores = vectors @ hidden
    scores[[0, 1, 2, 3]] = -np.inf
    assert [item.id for item in best] == [items[i - 1] for i in np.argsort(-scores, kind="stable")[:5]]
    np.testing.assert_allclose([item.score for item in best], np.sort(scores)[::-1][:5], atol=1e-5)
    lengths = np.linalg.norm(vectors, axis=1).clip(1e-12)
    cosines = vectors @ vectors[4] / lengths / lengths[4]
    assert recommender.similar(items[3], 1)[0].score == pytest.approx(np.delete(cosines, 4).max(), abs=1e-5)
    assert len(recommender.why(person, [best[0].id])) == 1
    together = recommender.recommend_batch([person] * 6, 5)  # by PQTable.best
    assert [item.id for item in together[5]] == [item.id for item in best]


def test_it_is_evaluated_and_resumed_with_its_codes(runs, tmp_path):
    shown = here("--eval_only=true", "--ckpt_name=last.pth", "--out_dir=one", cwd=runs)
    assert "TEST of" in shown.ok().stdout
    shutil.copytree(runs / "one", tmp_path / "one")
    shutil.copy(tmp_path / "one" / "epoch_0.pth", tmp_path / "one" / "last.pth")
    shutil.copy(runs / "actions.csv", tmp_path / "actions.csv")
    here("--dataset=actions.csv", *FLAGS, "--out_dir=one", "--resume=auto", cwd=tmp_path).ok()
    whole, resumed = (read_state(folder / "one" / "last.pth")["model"] for folder in (runs, tmp_path))
    assert all(torch.equal(weight, resumed[name]) for name, weight in whole.items())


def test_it_is_exported(runs, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="needs requirements-export.txt")
    sys.path.insert(0, str(MAIN.parent / "scripts"))
    import export

    flags = [f"--ckpt_name={runs / 'one' / 'best.pth'}", f"--out={tmp_path / 'exported'}"]
    here(*flags, cwd=tmp_path, program=export.main).ok()
    ours, theirs = (Recommender.load(path) for path in (runs / "one" / "best.pth", tmp_path / "exported"))
    found = [model.recommend(ours.catalogue.ids[:3], 20) for model in (ours, theirs)]
    assert [item.id for item in found[0]] == [item.id for item in found[1]]
    scores = [[item.score for item in items] for items in found]
    np.testing.assert_allclose(*scores, atol=1e-4)


def test_it_is_published(runs, tmp_path):
    pytest.importorskip("safetensors", reason="needs requirements-serve.txt")
    from reclm.serve import hub

    hub.write_model(runs / "one" / "best.pth", tmp_path)
    ours, theirs = Recommender.load(runs / "one" / "best.pth"), Recommender.load(tmp_path)
    history = ours.catalogue.ids[:3]
    assert theirs.recommend(history, 9) == ours.recommend(history, 9)


def test_it_is_no_page(runs, tmp_path):
    from reclm.serve.offline import write_offline_page

    with pytest.raises(UserError, match="cannot compute --item_table=pq: use scripts/serve.py"):
        write_offline_page(runs / "one" / "best.pth", tmp_path / "page.html")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"pq_codes": 3}, "--pq_codes=3 must divide --dim=64"),
        ({"pq_codes": 0}, "--pq_codes=0"),
        ({"pq_centroids": 1}, "--pq_centroids=1 must be 2 to 256"),
        ({"pq_centroids": 257}, "--pq_centroids=257 must be 2 to 256"),
        ({"item_features": "genres"}, "--item_features=genres"),
        ({"item_features": "genres", "id_dropout": 0.1}, "--item_features=genres"),
        ({"cold_items": 0.1}, "--cold_items=0.1 needs"),
        ({"init_from": "best.pth", "init_match": "none"}, "--init_match=none needs"),
        ({"init_from": "best.pth", "adapter": "lora"}, "--adapter=lora needs"),
        ({"item_table": "dense", "pq_codes": 4}, "--pq_codes=4 has no effect with --item_table=dense"),
        ({"item_table": "dense", "pq_centroids": 4}, "--pq_centroids=4 has no effect"),
    ],
)
def test_what_does_not_combine_is_refused(settings, named):
    with pytest.raises(UserError) as caught:
        build_config({"item_table": "pq"} | settings)
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--pq_centroids=200", "--pq_codes=16"])
def test_more_than_the_data_hold_is_refused_before_a_folder_is_made(flag, tmp_path):
    rows = "".join(f"{u},{i},{i}\n" for u in range(5) for i in range(u, u + 9))
    (tmp_path / "small.csv").write_text("user,item,timestamp\n" + rows)
    shown = here("--dataset=small.csv", *TINY, "--item_table=pq", flag, cwd=tmp_path)
    assert shown.code == 2 and len(shown.errors) == 1 and flag in shown.errors[0]
    assert not (tmp_path / "runs").exists()


def test_no_other_table_is_started_from(runs):
    shown = here("--dataset=actions.csv", *TINY, "--init_from=one/best.pth", "--out_dir=new", cwd=runs)
    assert shown.code == 2 and "has no vector per item" in shown.errors[0] and len(shown.errors) == 1
    shown = here("--eval_only=true", "--out_dir=one", "--item_table=dense", cwd=runs)
    assert shown.code == 2 and "--item_table=dense contradicts" in shown.errors[0]


def test_a_dense_table_is_started_from(runs):
    """Its items have codes and the sub-vectors nearest to their parts; the other weights are the same."""
    flags = ["--dataset=actions.csv", *TINY, "--dropout=0"]
    here(*flags, "--num_epochs=1", "--out_dir=dense", cwd=runs).ok()
    flags = ["--dataset=actions.csv", *FLAGS, "--dropout=0", "--lr=1e-9", "--init_from=dense/best.pth"]
    shown = here(*flags, "--out_dir=from-one", cwd=runs).ok()
    assert "started from dense/best.pth" in shown.stdout and "new: none" in shown.stdout
    assert "item vectors are now 4 codes each" in shown.stdout
    torchrun(2, *flags, "--out_dir=from-two", cwd=runs).ok()
    dense, one, two = (
        read_state(runs / name / "last.pth")["model"] for name in ("dense", "from-one", "from-two")
    )
    assert torch.equal(one["item_embedding.codes"], two["item_embedding.codes"])
    items = PQEmbedding(
        len(one["item_embedding.codes"]), ModelConfig(**PQ | {"dim": one["norm.weight"].numel()})
    )
    items.load_state_dict({name: one[f"item_embedding.{name}"] for name in ("weight", "codes")})
    vectors = dense["item_embedding.weight"]
    lost = (items.dense() - vectors).square().sum() / vectors.square().sum()
    assert 0 < lost < 0.6
    for name in one.keys() - {"item_embedding.weight", "item_embedding.codes"}:
        torch.testing.assert_close(one[name], dense[name], atol=1e-6, rtol=0)


def test_a_dense_table_of_fewer_items_is_started_from(runs):
    """Those that it lacks keep their initial vectors, and so have codes near these; on two processes too."""
    write_csv(runs / "fewer.csv", num_items=20)
    here("--dataset=fewer.csv", *TINY, "--num_epochs=1", "--out_dir=fewer", cwd=runs).ok()
    (runs / "fewer.csv").rename(runs / "grown.csv")
    with open(runs / "grown.csv", "a") as file:
        file.writelines(f"new{user},later{user % 9},5,{2e9 + t}\n" for user in range(20) for t in range(6))
    flags = ["--dataset=grown.csv", *FLAGS, "--init_from=fewer/best.pth"]
    shown = torchrun(2, *flags, "--out_dir=grown", cwd=runs).ok().stdout
    assert "9 new items start untrained" in shown and "item vectors are now 4 codes each" in shown


def test_codes_are_those_of_the_nearest():
    """As many sub-vectors as there are different parts lose nothing; with fewer, each code is the nearest."""
    items = table(12, dim=8, pq_codes=2, pq_centroids=12, n_heads=2)
    vectors = torch.randn(13, 8, dtype=torch.double)
    vectors[0] = 0
    items.load_state_dict(items.take(vectors, 0))
    torch.testing.assert_close(items.dense(), vectors)
    items = table(300, dim=8, pq_codes=2, pq_centroids=9, n_heads=2)
    vectors = torch.randn(301, 8, dtype=torch.double)
    items.load_state_dict(items.take(vectors, 0))
    for j, sub_vectors in enumerate(items.sub_tables()):
        distances = (vectors[1:, None, 4 * j : 4 * j + 4] - sub_vectors).norm(dim=2)
        assert torch.equal(items.codes[1:, j].long(), distances.argmin(1))
        means = [vectors[1:][items.codes[1:, j] == code, 4 * j : 4 * j + 4].mean(0) for code in range(9)]
        assert (torch.stack(means) - sub_vectors).norm() < 0.5  # of Lloyd's last step but one


def test_256_codes_are_read():
    """A tensor of uint8 takes 256 for 0."""
    items = table(300, pq_centroids=256)
    assert items.codes.max() > 250
    items.load_state_dict(items.state_dict())


def test_codes_of_no_sub_vector_are_refused(runs, tmp_path):
    state = read_state(runs / "one" / "best.pth")
    state["model"]["item_embedding.codes"][3, 1] = 8
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(UserError, match="codes are not below 8"):
        Recommender.load(tmp_path / "damaged.pth")


def test_it_is_quantized(runs, kind="int8"):
    """Codes stay, sub-vectors have 8 bits: a byte per number, and 4 for each of the D columns."""
    plain, small = (
        Recommender.load(runs / "one" / "best.pth", quantize=name).engine.model.item_embedding
        for name in ("none", kind)
    )
    assert torch.equal(plain.codes, small.codes) and num_bytes(small) == 26 * 4 + 4 * 8 * 4 + 16 * 4
    lost = (plain.weight - small.weight).abs().max()
    assert 0 < lost < plain.weight.aminmax().max / 100
    hidden = torch.randn(3, 16)
    torch.testing.assert_close(small.scores(hidden), hidden @ small.dense().T, atol=1e-5, rtol=1e-5)
    flags = ["--dataset=actions.csv", "--eval_only=true", f"--quantize={kind}", "--ckpt_name=one/best.pth"]
    shown = here(*flags, cwd=runs).ok().stdout
    assert f"one/best.pth, {kind}" in shown
