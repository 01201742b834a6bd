import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.functional.classification import multiclass_accuracy

from amt_ray.core.evals import Task
from amt_ray.core.evals.knn import KNN, class_votes, merged, nearest
from amt_ray.core.ports import Solo
from amt_ray.core.sampling import rank_share
from tests.core.probes import noise_images, on_threads, tiny_encoder


def unit(count, generator):
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)


def slow_votes(query, bank, labels, classes, k, temperature):
    by_nearness = sorted(range(len(bank)), key=lambda i: -float(query @ bank[i]))[:k]
    votes = [0.0] * classes
    for i in by_nearness:
        votes[int(labels[i])] += math.exp(float(query @ bank[i]) / temperature)
    return torch.tensor(votes) / sum(votes)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.5), (20, 0.07), (60, 0.2), (100, 0.2)])
def test_knn_votes__are_those_of_a_slow_loop_and_of_scikit_learn(k, temperature, generator):
    bank, queries = unit(60, generator), unit(15, generator)
    labels = torch.arange(60) % 4
    votes = class_votes(nearest(queries, bank, labels, k), 4, k, temperature)
    shares = votes / votes.sum(1, keepdim=True)
    slow = torch.stack([slow_votes(q, bank, labels, 4, k, temperature) for q in queries])
    assert torch.allclose(shares, slow, atol=1e-4)
    theirs = KNeighborsClassifier(
        min(k, 60), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(bank.numpy(), labels.numpy())
    assert np.allclose(shares.numpy(), theirs.predict_proba(queries.numpy()), atol=1e-4)


def test_knn_votes__do_not_overflow_at_a_tiny_temperature(generator):
    near = nearest(unit(5, generator), unit(30, generator), torch.arange(30) % 3, 10)
    votes = class_votes(near, 3, 10, 1e-4)
    assert torch.isfinite(votes).all() and (votes.sum(1) >= 1).all()


@pytest.mark.parametrize("size", [2, 3, 40])
def test_knn__the_nearest_of_shards_merge_to_the_nearest_of_all(size, generator):
    """Also where a shard has fewer images than k, or none."""
    bank, queries, labels = unit(30, generator), unit(7, generator), torch.arange(30) % 4
    alone = nearest(queries, bank, labels, 12)

    def look_up(ranks):
        mine = rank_share(torch.arange(30), ranks.rank, ranks.size)
        return merged(nearest(queries, bank[mine], labels[mine], 12), ranks)

    for near in on_threads(size, look_up):
        assert torch.allclose(near.similarity_Bk, alone.similarity_Bk, atol=1e-6)
        assert torch.equal(near.labels_Bk, alone.labels_Bk)


@pytest.fixture
def model():
    return tiny_encoder()


def run(protocol, model, images, bank, queries, ranks=None, **how):
    """Metrics without ``eval/``."""
    task = Task(images, torch.as_tensor(bank), torch.as_tensor(queries), None, (8, 8))
    return {name.removeprefix("eval/"): value for name, value in protocol(model, task, ranks or Solo(), **how).items()}


@pytest.mark.parametrize("features", ["cls", "mean"])
def test_knn__a_bank_of_the_queries_is_perfect(model, features, generator):
    images = noise_images(50, 10, generator)
    found = run(KNN(k=(1,), features=features), model, images, range(50), range(20))
    assert found == {"knn_top1": 1.0, "knn_top5": 1.0}


def test_knn__random_labels_are_guessed_at_chance(model, generator):
    found = run(KNN(k=(10,)), model, noise_images(900, 10, generator), range(500), range(500, 900))
    assert found["knn_top1"] == pytest.approx(0.1, abs=0.06) and found["knn_top5"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("features", ["cls", "mean"])
def test_knn__accuracies_are_scikit_learns_and_torchmetrics_on_the_same_features(model, features, generator):
    images, bank, queries = noise_images(160, 7, generator), torch.arange(100), torch.arange(100, 160)
    with torch.no_grad():
        pixels = images.whole(torch.arange(160), (8, 8))
        vectors = torch.nn.functional.normalize(model.eval().features(pixels, features), dim=1).numpy()
    oracle = KNeighborsClassifier(9, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)).fit(
        vectors[:100], images.labels_n[bank].numpy()
    )
    shares = torch.from_numpy(oracle.predict_proba(vectors[100:]))
    # torchmetrics fills up the five with classes of no neighbour: such an image is counted with a label of its own
    truth = images.labels_n[queries]
    voted = shares.gather(1, truth[:, None]).squeeze(1) > 0
    shares, truth = torch.nn.functional.pad(shares, (0, 1), value=-1.0), torch.where(voted, truth, 7)
    found = run(KNN(k=(9,), features=features), model, images, bank, queries)
    for top in (1, 5):
        theirs = multiclass_accuracy(shares, truth, 8, average="micro", top_k=top)
        # at most one query may fall on the other side of a tie of votes
        assert found[f"knn_top{top}"] == pytest.approx(float(theirs), abs=1 / 60 + 1e-6)


@pytest.mark.parametrize(("classes", "names"), [(3, {"knn_top1"}), (5, {"knn_top1"}), (6, {"knn_top1", "knn_top5"})])
def test_knn__top5_is_only_given_where_it_says_something(model, classes, names, generator):
    assert set(run(KNN(k=(3,)), model, noise_images(30, classes, generator), range(20), range(20, 30))) == names


def test_knn__several_k_and_both_features_in_one_pass_are_the_passes_of_each(model, generator):
    images, bank, queries = noise_images(120, 4, generator), range(80), range(80, 120)
    together = run(KNN(k=(5, 1, 20), features="both"), model, images, bank, queries)
    assert set(together) == {f"knn{k}{pool}_top1" for k in ("", "1", "20") for pool in ("", "_mean")}
    for k, part in ((5, ""), (1, "1"), (20, "20")):
        for features, suffix in (("cls", ""), ("mean", "_mean")):
            alone = run(KNN(k=(k,), features=features), model, images, bank, queries)
            assert together[f"knn{part}{suffix}_top1"] == alone["knn_top1"]


def test_knn__restores_the_mode_though_an_image_fails(model, generator):
    model.train()
    with pytest.raises(IndexError):
        run(KNN(k=(1,)), model, noise_images(10, 3, generator), range(10), [99])
    assert model.training


@pytest.mark.parametrize(("size", "queries"), [(2, 31), (3, 31), (3, 2)])
def test_knn__any_number_of_ranks_finds_the_same(model, size, queries, generator):
    """Also where a rank has no query of its own."""
    images, chosen = noise_images(100, 6, generator), range(60, 60 + queries)
    knn = KNN(k=(5, 40), features="both", batch_size=7)
    alone = run(knn, model.eval(), images, range(60), chosen)
    for found in on_threads(size, lambda ranks: run(knn, model, images, range(60), chosen, ranks)):
        assert found == pytest.approx(alone)


@pytest.mark.parametrize("queries", [range(60, 100), range(60, 61)])
def test_knn__progress_rises_to_one(model, queries, generator):
    shares = []
    run(KNN(batch_size=16), model, noise_images(100, 6, generator), range(60), queries, progress=shares.append)
    assert shares == sorted(shares) and shares[0] >= 0 and shares[-1] == 1 and len(shares) > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": ()}, "must be above 0, got ()"),
        ({"k": (5, 0)}, r"must be above 0, got \(5, 0\)"),
        ({"temperature": 0.0}, "must be above 0, got .* and 0.0"),
        ({"features": "max"}, "features must be one of cls, mean, both, got 'max'"),
    ],
)
def test_knn__bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KNN(**settings)


def test_knn__a_k_larger_than_the_bank_is_refused(model, generator):
    with pytest.raises(ValueError, match="k must be at most the number of bank images, got 200 of 30"):
        run(KNN(k=(5, 200)), model, noise_images(40, 3, generator), range(30), range(30, 40))


def test_knn__its_protocol_names_every_setting_that_changes_the_number():
    assert KNN().protocol == KNN(batch_size=7, precision="bfloat16").protocol == "knn-20-t0.07"
    assert KNN(k=(200,), temperature=0.1).protocol == "knn-200-t0.1"
    assert KNN(features="mean").protocol == "knn-20-t0.07+features=mean"
    assert KNN(k=(200,), temperature=0.2).protocol == "knn-200-t0.1+temperature=0.2"
