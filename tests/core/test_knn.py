import math
import threading

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from amt_ray.core.encoder import Encoder
from amt_ray.core.evals.knn import KNN, knn_votes
from amt_ray.core.images import ImageArray
from amt_ray.core.ports import Solo


def unit(count, generator):
    return torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)


def slow_votes(query, bank, labels, classes, k, temperature):
    by_nearness = sorted(range(len(bank)), key=lambda i: -float(query @ bank[i]))[:k]
    votes = [0.0] * classes
    for i in by_nearness:
        votes[int(labels[i])] += math.exp(float(query @ bank[i]) / temperature)
    return torch.tensor(votes) / sum(votes)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.5), (20, 0.07), (1000, 0.2)])
def test_knn_votes__are_those_of_a_slow_loop_and_of_scikit_learn(k, temperature, generator):
    bank, queries = unit(60, generator), unit(15, generator)
    labels = torch.arange(60) % 4
    votes = knn_votes(queries, bank, labels, 4, k, temperature)
    shares = votes / votes.sum(1, keepdim=True)
    slow = torch.stack([slow_votes(q, bank, labels, 4, k, temperature) for q in queries])
    assert torch.allclose(shares, slow, atol=1e-4)
    theirs = KNeighborsClassifier(
        min(k, 60), metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
    ).fit(bank.numpy(), labels.numpy())
    assert np.allclose(shares.numpy(), theirs.predict_proba(queries.numpy()), atol=1e-4)


def test_knn_votes__do_not_overflow_at_a_tiny_temperature(generator):
    votes = knn_votes(unit(5, generator), unit(30, generator), torch.arange(30) % 3, 3, 10, 1e-4)
    assert torch.isfinite(votes).all() and (votes.sum(1) >= 1).all()


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoder = Encoder(8, 4, 3, 16, 1, 2)
    encoder.init_weights()
    return encoder


def array(count, classes, generator):
    pixels = torch.randint(0, 256, (count, 3, 8, 8), generator=generator).byte().numpy()
    labels = torch.randint(0, classes, (count,), generator=generator).numpy()
    return ImageArray(pixels, labels, (0.5,) * 3, (0.25,) * 3, tuple(map(str, range(classes))))


def run(protocol, model, images, bank, queries, ranks=None):
    return protocol(model, images, torch.as_tensor(bank), images, torch.as_tensor(queries), (8, 8), ranks or Solo())


@pytest.mark.parametrize("features", ["cls", "mean"])
@pytest.mark.parametrize("training", [True, False])
def test_knn__a_bank_of_the_queries_is_perfect_and_the_model_is_untouched(model, features, training, generator):
    model.train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = array(50, 10, generator)
    assert run(KNN(k=1, features=features), model, images, range(50), range(20)) == {"knn_top1": 1.0, "knn_top5": 1.0}
    assert model.training is training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_knn__random_labels_are_guessed_at_chance(model, generator):
    found = run(KNN(k=10), model, array(900, 10, generator), range(500), range(500, 900))
    assert found["knn_top1"] == pytest.approx(0.1, abs=0.06) and found["knn_top5"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("classes", "names"), [(3, {"knn_top1"}), (5, {"knn_top1"}), (6, {"knn_top1", "knn_top5"})])
def test_knn__top5_is_only_given_where_it_says_something(model, classes, names, generator):
    assert set(run(KNN(k=3), model, array(30, classes, generator), range(20), range(20, 30))) == names


def test_knn__restores_the_mode_though_an_image_fails(model, generator):
    images = array(10, 3, generator)
    model.train()
    with pytest.raises(IndexError):
        run(KNN(k=1), model, images, range(10), [99])
    assert model.training


class ThreadRanks:
    """Ranks that are threads of this process and add up at a barrier."""

    def __init__(self, rank, size, barrier, board):
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self.barrier, self.board = barrier, board

    def sum(self, tensor):
        self.board[self.rank] = tensor
        self.barrier.wait(20)
        total = torch.stack([self.board[r] for r in range(self.size)]).sum(0)
        self.barrier.wait(20)
        return total


@pytest.mark.parametrize(("size", "queries"), [(2, 31), (3, 31), (3, 2)])
def test_knn__any_number_of_ranks_finds_the_same(model, size, queries, generator):
    """Also where a rank has no query of its own."""
    images, chosen = array(100, 6, generator), range(60, 60 + queries)
    alone = run(KNN(k=5, batch_size=16), model.eval(), images, range(60), chosen)
    barrier, board, found, failed = threading.Barrier(size), {}, {}, []

    def work(rank):
        try:
            ranks = ThreadRanks(rank, size, barrier, board)
            found[rank] = run(KNN(k=5, batch_size=16), model, images, range(60), chosen, ranks)
        except Exception as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    assert all(found[rank] == pytest.approx(alone) for rank in range(size))


def test_knn__its_protocol_names_every_setting_that_changes_the_number():
    assert KNN().protocol == "knn-20-t0.07-cls"
    assert len({KNN(k=5).protocol, KNN(temperature=0.1).protocol, KNN(features="mean").protocol, KNN().protocol}) == 4
