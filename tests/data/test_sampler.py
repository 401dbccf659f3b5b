import itertools

import pytest

from dckd_sr.data.sampler import Stage, TrainSampler


def take(sampler, count):
    """The first `count` (position, index) of the batches in a row."""
    return [key[:2] for key in itertools.islice(itertools.chain.from_iterable(sampler), count)]


def test_every_pass_is_another_permutation():
    rows = take(TrainSampler(10, 4, 1, 0, seed=3), 30)
    assert [position for position, _ in rows] == list(range(30))
    passes = [[index for _, index in rows[k : k + 10]] for k in (0, 10, 20)]
    assert all(sorted(turn) == list(range(10)) for turn in passes)
    assert passes[0] != passes[1] != passes[2] and passes[0] != sorted(passes[0])


def test_the_order_is_fixed_for_ever():
    """Written down: another shuffle would silently change every run of every user."""
    assert [index for _, index in take(TrainSampler(8, 2, 1, 0, seed=10), 8)] == [0, 3, 5, 4, 6, 7, 1, 2]


@pytest.mark.parametrize('length, batch, world', [(10, 2, 2), (7, 3, 4), (1, 4, 3)])
def test_the_order_does_not_depend_on_the_world_size(length, batch, world):
    """Rank r takes rows r * B .. r * B + B - 1 of every global batch, also across passes and for tiny datasets."""
    single = take(TrainSampler(length, batch * world, 1, 0, seed=5), 6 * batch * world)
    ranks = [take(TrainSampler(length, batch, world, rank, seed=5), 6 * batch) for rank in range(world)]
    merged = [row for t in range(6) for rank in ranks for row in rank[t * batch : (t + 1) * batch]]
    assert merged == single


def test_continues_after_iterations_already_done():
    whole = take(TrainSampler(7, 3, 2, 1, seed=5), 30)
    assert take(TrainSampler(7, 3, 2, 1, seed=5, start_iteration=4), 18) == whole[12:]
    far = TrainSampler(7, 3, 2, 1, seed=5, start_iteration=10**6)
    assert take(far, 1)[0][0] == 10**6 * 6 + 3


def test_seed_changes_the_order_and_the_ratio_only_the_epoch_length():
    orders = [take(TrainSampler(50, 4, 1, 0, seed), 50) for seed in (0, 1)]
    assert orders[0] != orders[1]
    assert take(TrainSampler(50, 4, 1, 0, 0, enlarge_ratio=100), 50) == orders[0]
    assert TrainSampler(50, 4, 2, 0, 0).iterations_per_epoch == 7
    assert TrainSampler(50, 4, 2, 0, 0, enlarge_ratio=100).iterations_per_epoch == 625


STAGES = [Stage(3, 4, 32), Stage(2, 3, 48), Stage(1, 1, 64)]


def test_progressive_stages():
    batches = list(itertools.islice(TrainSampler(5, STAGES, 1, 0, seed=1), 8))
    assert [len(batch) for batch in batches] == [4, 4, 4, 3, 3, 1, 1, 1]
    assert [batch[0][2] for batch in batches] == [32, 32, 32, 48, 48, 64, 64, 64]
    positions = [key[0] for batch in batches for key in batch]
    assert positions == list(range(21))  # no sample is passed over or seen twice where the stage changes
    for start in range(8):
        assert next(iter(TrainSampler(5, STAGES, 1, 0, 1, start_iteration=start))) == batches[start]


def test_micro_batches_and_processes_share_the_global_batch():
    whole = list(itertools.islice(TrainSampler(7, 12, 1, 0, seed=2), 3))
    ranks = [list(itertools.islice(TrainSampler(7, 2, 3, rank, 2, accum_iter=2), 6)) for rank in range(3)]
    merged = [[key for a in (0, 1) for rank in ranks for key in rank[2 * t + a]] for t in range(3)]
    assert merged == whole
    assert TrainSampler(24, 2, 3, 0, 2, accum_iter=2).iterations_per_epoch == 2


@pytest.mark.parametrize('batch, world, accum_iter', [(3, 2, 1), (1, 3, 2), (2, 2, 2), (5, 1, 1)])
def test_partners_of_mixup_come_with_the_batch_that_lacks_them(batch, world, accum_iter):
    total = batch * world * accum_iter
    plain, extra = {}, 0
    for rank, micro in itertools.product(range(world), range(accum_iter)):
        plain = TrainSampler(7, batch, world, rank, 2, accum_iter=accum_iter).keys(4, micro)
        mixed = TrainSampler(7, batch, world, rank, 2, accum_iter=accum_iter, mixes=True).keys(4, micro)
        assert [key[:3] for key in mixed[:batch]] == plain  # nobody's own samples change
        rows = [key[0] - 4 * total for key in mixed]
        wanted = {min(row ^ 1, total - 1) if row ^ 1 < total else row for row in rows[:batch]}
        assert wanted <= set(rows) and len(rows) == len(set(rows)) <= batch + 2
        if len(mixed) > batch:
            assert [key[3] for key in mixed] == [True] * batch + [False] * (len(mixed) - batch)
            extra += 1
    assert bool(extra) == (batch % 2 == 1 and total > batch)


@pytest.mark.parametrize(
    'changed', [{'length': 0}, {'stages': 0}, {'stages': []}, {'accum_iter': 0}, {'rank': 2}, {'enlarge_ratio': 0}]
)
def test_senseless_numbers(changed):
    with pytest.raises(ValueError, match='length'):
        TrainSampler(**{'length': 5, 'stages': 2, 'world_size': 2, 'rank': 0, 'seed': 0, **changed})
