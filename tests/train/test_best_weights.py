"""`train.best_metric` and `train.patience`: what is kept, when a run stops, and resumes of it."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import balanced_accuracy_score, f1_score
from support.tiny import records, tiny_recipe, train_recipe
from support.watching import Told
from torch.nn.functional import cross_entropy

from vitcli.commands import evaluate
from vitcli.config.recipe import check
from vitcli.config.schema import Recipe
from vitcli.errors import VitcliError
from vitcli.progress import Quiet
from vitcli.train import best_weights
from vitcli.train import loop as loop_module
from vitcli.train.best_weights import BestWeights
from vitcli.train.build import open_source
from vitcli.train.resolve import pretrained_model
from vitcli.train.session import train
from vitcli.weights.load import load_model


@pytest.mark.parametrize(
    ("metric", "patience", "values", "best", "over"),
    [
        ("accuracy", None, [0.2, 0.5, 0.4, 0.1], 2, False),
        ("accuracy", 2, [0.2, 0.5, 0.4], 2, False),
        # The later of equal weights are kept, but an equal value does not prolong the run.
        ("accuracy", 2, [0.2, 0.5, 0.4, 0.5], 4, True),
        ("accuracy", 3, [0.2, 0.5, 0.5, 0.4], 3, False),
        ("loss", 1, [1.0, 1.0], 2, True),
        ("loss", 1, [2.0, 1.0], 2, False),
        ("loss", 1, [2.0, 1.0, 1.5], 2, True),
        ("loss", 1, [math.nan, 1.0], 2, False),
        ("loss", 1, [1.0, math.nan], 1, True),
        ("loss", 1, [math.nan, math.nan], None, False),
        ("loss", 1, [], None, False),
    ],
)
def test_the_best_step_and_the_patience(metric, patience, values, best, over):
    found = BestWeights(metric, patience)
    better = []
    for step, value in enumerate(values, start=1):
        better.append(found.is_better(value))
        found.values[step] = value
    assert (found.step, found.is_over) == (best, over)
    steps = [step for step, is_better in enumerate(better, start=1) if is_better]
    assert (steps[-1] if steps else None) == best  # the file is written at the best step last
    again = BestWeights(metric, patience)
    again.restore([{"step": s, f"validation/{metric}": v} for s, v in found.values.items()])
    assert (again.step, again.is_over) == (best, over)


def test_a_run_that_is_made_longer_counts_its_patience_from_there():
    found = BestWeights("loss", 2)
    values = {1: 1.0, 2: 2.0, 3: 2.0}
    found.restore([{"step": s, "validation/loss": v} for s, v in values.items()])
    assert found.is_over
    found.restore([{"step": s, "validation/loss": v} for s, v in values.items()], since=3)
    over = []
    for step in (4, 5):
        found.values[step] = 3.0
        over.append(found.is_over)
    assert over == [False, True] and found.step == 1


NAMES = ("model", "best", "last")
# So high a rate that the loss of the validation images rises again.
SETTINGS = {
    "data": {"validation_fraction": 0.2},
    "optim": {"name": "adamw", "lr": 0.05},
    "train": {"steps": 40, "eval_steps": 2, "best_metric": "loss", "patience": 2},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that stops early, and its records."""
    out = tmp_path_factory.mktemp("best") / "run"
    return out, train_recipe(out, tiny_recipe(**SETTINGS))


def test_a_run_stops_and_keeps_its_best_weights(whole):
    out, result = whole
    losses = {r["step"]: r["validation/loss"] for r in records(out) if "validation/loss" in r}
    best = min(losses, key=losses.get)
    assert result.best == {
        "split": "validation", "metric": "loss", "value": losses[best], "step": best
    }  # fmt: skip
    assert result.steps == best + 4 == max(losses) < 40
    assert json.loads((out / "result.json").read_text())["best"] == result.best
    source = open_source(tiny_recipe(**SETTINGS), Quiet())
    model = load_model(out / "best.safetensors")
    assert model.head_trained and model.split_record is not None
    split = source.splits["validation"]
    images = [model.preprocess(split.read(i, "RGB")) for i in range(len(split))]
    with torch.no_grad():
        loss = cross_entropy(model(torch.stack(images)), torch.as_tensor(split.labels))
    assert float(loss) == pytest.approx(losses[best], rel=1e-4)


def test_a_run_that_has_stopped_early_trains_longer_if_it_is_asked_to(whole, tmp_path, monkeypatch):
    out, result = whole
    longer = {**SETTINGS, "train": {**SETTINGS["train"], "steps": 60}}
    again, told = tmp_path / "run", Told()
    shutil.copytree(out, again)
    found = train_recipe(again, tiny_recipe(**longer), resume=True, watch=told)
    # Two more evaluations, unless one of them is the best so far.
    assert found.steps >= result.steps + 4
    (bar,) = (bar for bar in told.bars if bar[0] == "train")
    assert bar[1] == bar[3] == found.steps < 60  # the progress bar ends where the run stopped
    # An interruption after the change does not alter it.
    killed, stop = tmp_path / "killed", loop_module.stop_early
    shutil.copytree(out, killed)

    def stop_or_die(loop, best):
        if best.is_over:
            raise KeyboardInterrupt
        stop(loop, best)

    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "stop_early", stop_or_die)
        with pytest.raises(KeyboardInterrupt):
            train_recipe(killed, tiny_recipe(**longer), resume=True)
    assert train_recipe(killed, tiny_recipe(**longer), resume=True).steps == found.steps
    one, other = ((run / "model.safetensors").read_bytes() for run in (again, killed))
    assert one == other


@pytest.mark.parametrize("moment", ["before the file", "before the record", "before the stop"])
def test_a_run_that_is_killed_keeps_the_same_weights_and_stops_at_the_same_step(
    whole, moment, tmp_path, monkeypatch
):
    out, result = whole
    best = result.best["step"]

    class Killed(BaseException):
        pass

    def kill(at):
        if at:
            raise Killed

    write, keep, stop = best_weights.write_weights, loop_module.keep_best, loop_module.stop_early

    def write_or_die(path, model, state, *given, **named):
        kill(moment == "before the file" and state.step == best)
        write(path, model, state, *given, **named)

    def keep_and_die(loop, *given):
        keep(loop, *given)
        kill(moment == "before the record" and loop.state.step == best)

    def stop_or_die(loop, found):
        kill(moment == "before the stop" and found.is_over)
        stop(loop, found)

    with monkeypatch.context() as patch:
        patch.setattr(best_weights, "write_weights", write_or_die)
        patch.setattr(loop_module, "keep_best", keep_and_die)
        patch.setattr(loop_module, "stop_early", stop_or_die)
        with pytest.raises(Killed):
            train_recipe(tmp_path / "run", tiny_recipe(**SETTINGS))
    again = train_recipe(tmp_path / "run", tiny_recipe(**SETTINGS), resume=True)
    assert (again.best, again.steps) == (result.best, result.steps)
    for name in ("best.safetensors", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (out / name).read_bytes()


def test_the_run_exports_and_evaluates_its_best_weights(whole):
    """Against a second evaluation of the exported file, which knows nothing of the run."""
    out, result = whole
    assert result.weights == {"name": "best", "step": result.best["step"]}
    assert (result.figures["split"], result.figures["weights"]) == ("test", "best")
    tensors = [load_model(out / f"{name}.safetensors").state_dict() for name in NAMES]
    assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert any(not torch.equal(tensors[0][key], tensors[2][key]) for key in tensors[0])
    again = evaluate.run("builtin:digits", model=str(out), precision="fp32")
    assert again.to_json()["top1"] == pytest.approx(result.figures["accuracy"])
    assert result.validation["loss"] == result.best["value"]


def test_adapters_belong_to_the_exported_weights(whole, tmp_path):
    """Best weights with LoRA: the adapters beside them merge into the same weights."""
    settings = tiny_recipe(**SETTINGS).model_dump(mode="json", exclude_none=True)
    settings |= {"command": "finetune", "lora": {"rank": 2}, "model": {"name": str(whole[0])}}
    recipe = check(Recipe, settings, "lora")
    result = train(
        recipe,
        lambda source: pretrained_model(recipe, source, Quiet()),
        out=tmp_path / "run",
        resume=False,
        watch=Quiet(),
    )
    assert result.weights["name"] == "best"
    adapters = (tmp_path / "run/lora.safetensors").read_bytes()
    assert adapters == (tmp_path / "run/best_lora.safetensors").read_bytes()


def test_macro_figures_are_those_of_scikit_learn(whole):
    out, result = whole
    outcomes = load_file(out / "outcomes.safetensors")
    truth, predicted = outcomes["label"].numpy(), outcomes["predicted"].numpy()
    assert result.figures["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(truth, predicted), abs=1e-12
    )
    assert result.figures["macro_f1"] == pytest.approx(
        f1_score(truth, predicted, average="macro"), abs=1e-12
    )
    assert result.figures["balanced_accuracy"] != result.figures["accuracy"]
    found = [set(r) for r in records(out) if "validation/loss" in r]
    assert all({"validation/balanced_accuracy", "validation/macro_f1"} <= keys for keys in found)


def test_few_shot_accuracy_is_a_metric_and_the_run_goes_on_without_patience(tmp_path):
    recipe = tiny_recipe(
        objective={"name": "masked_patch"},
        data={"validation_fraction": 0.2},
        train={"steps": 4, "eval_steps": 2, "fewshot_shots": 2, "best_metric": "fewshot_accuracy"},
    )
    result = train_recipe(tmp_path / "run", recipe)
    assert result.steps == 4
    assert result.best["value"] == result.figures["best_fewshot_accuracy"]
    assert result.best["step"] == result.figures["best_fewshot_step"]
    assert (tmp_path / "run/best.safetensors").is_file()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"best_metric": "accuracy"}}, "needs validation images"),
        (
            {"data": {"validation_fraction": 0.2}, "train": {"best_metric": "map"}},
            "has loss, accuracy, balanced_accuracy, macro_f1",
        ),
        (
            {
                "data": {"validation_fraction": 0.2},
                "objective": {"name": "mse"},
                "train": {"best_metric": "balanced_accuracy"},
            },
            "has loss, mae, rmse, r2",
        ),
        (
            {
                "data": {"validation_fraction": 0.2},
                "train": {
                    "best_metric": "loss",
                    "patience": 1,
                    "budget": "9s",
                    "steps": None,
                    "eval_steps": None,
                },
            },
            "counts evaluations",
        ),
    ],
)
def test_errors_come_before_the_run(sections, words, tmp_path):
    with pytest.raises(VitcliError, match=words):
        train_recipe(tmp_path / "run", tiny_recipe(**sections))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("names", "metric"),
    [
        (["loss", "accuracy", "balanced_accuracy", "macro_f1"], "accuracy"),
        (["loss", "map", "micro_f1", "macro_f1"], "map"),
        (["loss", "mae", "rmse", "r2"], "rmse"),
        (["fewshot_accuracy"], "fewshot_accuracy"),
    ],
)
def test_patience_alone_takes_the_usual_metric_of_the_labels(names, metric):
    recipe = tiny_recipe(train={"patience": 2})
    found = best_weights.best_weights(recipe, ["validation", "test"], names)
    assert (found.metric, found.patience) == (metric, 2)
    with pytest.raises(VitcliError, match=r"`train\.patience=2` needs validation images"):
        best_weights.best_weights(recipe, ["test"], names)


@pytest.mark.parametrize(("metric", "best"), [("mae", 2), ("rmse", 2), ("r2", 1)])
def test_errors_of_a_regression_are_better_when_lower(metric, best):
    assert BestWeights(metric, values={1: 0.9, 2: 0.1, 3: 0.5}).step == best
