"""Who waits for whom in a run, and that it is told once, with numbers that are right."""

import time

import numpy as np
import pytest
import torch
from support.tiny import records, tiny_recipe
from support.watching import Told

from vitcli.config.schema import AugmentSection
from vitcli.data import image_set as sets
from vitcli.data.augment.transform import TrainTransform
from vitcli.data.image_set import ArrayStore, FileStore, ImageSet
from vitcli.data.loader import TrainLoader
from vitcli.preprocess import Preprocess
from vitcli.train import meters
from vitcli.train.meters import StepTimes, WaitTimer, is_filling_cache, slow_data_warning
from vitcli.train.resolve import random_model
from vitcli.train.session import train


class Clock:
    """Time that passes when told to."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(meters.time, "perf_counter", lambda: self.now)

    def work(self, watched, waits, works, idle=0.0):
        """A run whose batches take `waits` to come and `works` to be used."""

        def batches():
            for wait in waits:
                self.now += wait
                yield object()

        for _, work in zip(watched.over(batches()), works, strict=True):
            self.now += work
            watched.step_done()
            self.now += idle  # a checkpoint, an evaluation


def test_waiting_and_working_are_told_apart(monkeypatch):
    watched = WaitTimer(torch.device("cpu"))
    Clock(monkeypatch).work(watched, [9.0] * 5 + [0.25] * 8, [9.0] * 5 + [1.0] * 8, idle=50.0)
    spent = watched.read()
    assert (spent.waited, spent.worked, spent.steps) == pytest.approx((2.0, 8.0, 8))
    assert spent.wait_fraction == pytest.approx(0.2)
    assert watched.read() == StepTimes()  # only what is new
    assert watched.slow_window() is None  # 8 steps are no window


@pytest.mark.parametrize(
    ("steps", "wait", "work", "slow"),
    [
        (25, 0.3, 1.0, True),
        (25, 0.2, 1.0, False),
        (25, 0.03, 0.1, False),  # 2.6 seconds: too short for a verdict
        (24, 0.3, 1.0, False),  # 19 steps after the first five
    ],
)
def test_a_verdict_needs_a_window(steps, wait, work, slow, monkeypatch):
    watched = WaitTimer(torch.device("cpu"))
    Clock(monkeypatch).work(watched, [wait] * steps, [work] * steps)
    watched.read()
    assert (watched.slow_window() is not None) is slow
    if steps == 25 and work == 1.0:
        assert watched.slow_window() is None  # a new window has begun


class Events:
    """Stands for `torch.cuda.Event`: a queue whose marks are passed when the work before is."""

    def __init__(self):
        self.cpu = self.gpu = 0.0

    def make(self, enable_timing):
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, queue):
        self.queue = queue

    def record(self, stream):
        self.queue.gpu = self.at = max(self.queue.gpu, self.queue.cpu)

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1000 * (other.at - self.at)


@pytest.mark.parametrize(("loading", "waited"), [(0.6, 0.0), (1.5, 0.5)])
def test_a_gpu_waits_only_when_it_has_nothing_to_do(loading, waited, monkeypatch):
    """The program gives the device a second of work at once and goes on to the next batch."""
    events = Events()
    monkeypatch.setattr(torch.cuda, "Event", events.make)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    watched = WaitTimer(torch.device("cuda"))

    def batches():
        for _ in range(15):
            events.cpu += loading
            yield object()

    for _ in watched.over(batches()):
        events.gpu += 1.0
        watched.step_done()
    spent = watched.read()
    assert (spent.steps, spent.waited, spent.worked) == pytest.approx((10, 10 * waited, 10))


def a_loader(images, workers=1):
    transform = TrainTransform(Preprocess((8, 8)), AugmentSection())
    return TrainLoader(images, transform, batch_size=4, seed=0, workers=workers)


def a_set(store, count=12):
    return ImageSet("train", ["a"], np.zeros(count, dtype=np.int64), store)


def test_the_warning_has_both_speeds_and_what_helps(tmp_path):
    files = a_loader(a_set(FileStore(tmp_path, [b"x"] * 12)))
    text = slow_data_warning(StepTimes(3.0, 1.0, 100), files, "photos")
    assert "slow: 100 images/s" in text
    assert "can train on 400 images/s" in text
    assert "75%" in text
    assert "`vitcli patchify photos --out DIR`" in text
    array = ArrayStore("memory", np.zeros((12, 8, 8, 3), dtype=np.uint8))
    assert "patchify" not in slow_data_warning(
        StepTimes(3.0, 1.0, 100), a_loader(a_set(array)), "builtin:x"
    )
    monkey = a_loader(a_set(array), workers=0)
    assert "data.workers=" in slow_data_warning(StepTimes(3.0, 1.0, 100), monkey, "builtin:x")


def test_a_first_epoch_that_fills_the_memory_is_no_measure():
    images = a_set(ArrayStore("memory", np.zeros((12, 8, 8, 3), dtype=np.uint8)))
    loader = a_loader(images)
    images.read(0)
    assert images.is_cached
    assert is_filling_cache(loader, 11)
    assert not is_filling_cache(loader, 12)


@pytest.mark.parametrize("slow", [False, True])
def test_a_run_says_so_once(slow, tmp_path, monkeypatch):
    content = ArrayStore.content

    def slowly(store, row):
        time.sleep(0.002 if slow else 0.0)
        return content(store, row)

    monkeypatch.setattr(ArrayStore, "content", slowly)
    monkeypatch.setattr(sets, "CACHE_BYTES", 0)
    monkeypatch.setattr(meters, "WINDOW_STEPS", 5)
    monkeypatch.setattr(meters, "WINDOW_SECONDS", 0.01)
    monkeypatch.setattr(meters, "MAX_WAIT_FRACTION", 0.2 if slow else 0.95)
    heard = Told()
    recipe = tiny_recipe(data={"workers": 1}, train={"steps": 24, "eval_steps": 100})
    train(
        recipe,
        lambda source: random_model(recipe, source),
        out=tmp_path / "run",
        resume=False,
        watch=heard,
    )
    told = [line for line in heard.warnings if "data loading is slow" in line]
    assert len(told) == slow
    steps = [r for r in records(tmp_path / "run") if "train/loss" in r]
    assert len(steps) == 24
    assert not any("data/wait_fraction" in record for record in steps[: meters.WARMUP_STEPS])
    shares = [record["data/wait_fraction"] for record in steps[meters.WARMUP_STEPS :]]
    assert all(0 <= share <= 1 for share in shares)
    if slow:
        assert np.median(shares) > 0.2
        assert "data loading is slow" in (tmp_path / "run/log.txt").read_text()
