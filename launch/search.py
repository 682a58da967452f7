"""hparams=: sweeps whose next job Optuna chooses by how the earlier ones went. Imports Optuna only to search."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue
from pydantic import ValidationError

from launch.check import checked
from launch.compose import tree_of
from launch.schema import ConfigError, HparamsConfig, ObjectiveConfig, first_line
from launch.wording import MISTAKES, one_line
from tracking.record import RunRecord

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

STUDY = "study.journal"  # in the sweep's folder: every trial, as `optuna-dashboard` reads it, too
RESULTS = "optimization_results.yaml"  # named and worded as Hydra's own Optuna plugin has it


class Search(Sweeper):
    """Hydra's own sweeper, which runs every combination, unless the config has a `hparams` section: then a search.

    A trial is a job whose number is the trial's. One without a finite objective counts as failed, and the search goes
    on. One that was interrupted is run again, under its number, when the search is resumed.
    """

    def __init__(self, max_batch_size: int | None, params: dict[str, str] | None) -> None:
        # Not at the top: Hydra executes this module once more when it looks for plugins.
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

        class Checked(BasicSweeper):
            def validate_batch_is_legal(self, batch: Any) -> None:
                """They have been composed, and more, before there was a folder."""

        self.every_combination: Sweeper = Checked(max_batch_size, params)
        self.combinations = BasicSweeper.split_arguments

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.settings, self.loader = config, hydra_context.config_loader
        self.every_combination.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self.runs: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        if self.settings.get("hparams") is None:
            check_discrete(arguments)
            parsed = OverridesParser.create(self.loader).parse_overrides(list(arguments))
            self.check_jobs([job for batch in self.combinations(parsed, None) for job in batch], parsed)
            return self.every_combination.sweep(arguments)
        wanted = section(self.settings, "hparams", HparamsConfig)
        objective = section(self.settings, "objective", ObjectiveConfig)
        fixed, space = split(wanted.params, arguments)
        if not space:
            raise ConfigError(
                "hparams: there is nothing to search; give a key an interval, a range or choices, such as "
                "optimizer.lr='interval(1e-4, 1e-2)'."
            )
        check_used(space, self.settings)
        resumed = self.settings.resume_sweep is not None
        if not resumed:
            self.check_first(fixed, space)
        sweep_dir = Path(self.settings.hydra.sweep.dir)
        sweep_dir.mkdir(parents=True, exist_ok=True)
        if not resumed and (sweep_dir / STUDY).exists():
            raise ConfigError(
                f"hydra.sweep.dir={sweep_dir} already holds a search; choose another, or go on with that one by "
                f"resume_sweep={sweep_dir}."
            )
        OmegaConf.save(self.settings, sweep_dir / "multirun.yaml")
        return self.search(
            open_study(sweep_dir, wanted.sampler, self.settings.seed), wanted.trials, objective, fixed, space
        )

    def check_jobs(self, jobs: Sequence[Sequence[str]], parsed: Sequence[Override]) -> None:
        """ConfigError for the first job that cannot go, before there is a folder, and before the first one starts.

        Of a sweep that is resumed, each is checked when it is its turn: some have completed, whatever is so today.
        """
        if self.settings.resume_sweep is not None:
            return
        varied = [override.get_key_element() for override in parsed if override.is_sweep_override()]
        wrong = {}
        for number, words in enumerate(jobs):
            try:
                self.check_job(words)
            except MISTAKES as error:
                wrong[number] = one_line(error)
        if not wrong:
            return
        number = min(wrong)
        chosen = " ".join(word for word in jobs[number] if word.partition("=")[0] in varied)
        more = f" {len(wrong)} of {len(jobs)} jobs cannot go; none was started." if len(jobs) > 1 else ""
        raise ConfigError(f"job {number}{f' ({chosen})' if chosen else ''}: {wrong[number]}{more}")

    def check_first(self, fixed: Sequence[str], space: dict[str, BaseDistribution]) -> None:
        """ConfigError if no trial can go, whatever is chosen: what is searched may go in one and not in another."""
        chosen = [f"{key}={first_of(distribution)}" for key, distribution in space.items()]
        try:
            self.check_job([*fixed, *chosen])
        except MISTAKES as error:
            line = one_line(error)
            if not any(key.lstrip("+") in line for key in space):
                raise ConfigError(line) from None

    def check_job(self, words: Sequence[str]) -> None:
        config = self.loader.load_sweep_config(self.settings, list(words))
        OmegaConf.set_struct(config, False)
        hydra = config.pop("hydra")
        config.pop("resume_sweep")
        checked({**tree_of(config, hydra), "run_dir": str(self.settings.hydra.sweep.dir)})

    def search(
        self,
        study: Study,
        trials: int,
        objective: ObjectiveConfig,
        fixed: Sequence[str],
        space: dict[str, BaseDistribution],
    ) -> list[Any]:
        """Run trials until there are as many as asked for; the jobs' returns."""
        from optuna.trial import TrialState

        under_way = [trial.number for trial in study.get_trials(states=(TrialState.RUNNING,))]
        returns = []
        while under_way or len(study.trials) < trials:
            number = under_way.pop(0) if under_way else study.ask(space).number
            chosen = [f"{key}={value}" for key, value in study.trials[number].params.items()]
            try:
                (job,) = self.runs.launch([[*fixed, *chosen]], initial_job_idx=number)
                returns.append(job)
                value = float(job.return_value)
            except HydraException as error:  # a choice that no config can be composed of
                print(f"{number}: {str(error).splitlines()[0]}; the trial counts as failed.", file=sys.stderr)
                value = math.nan
            if math.isfinite(value):
                study.tell(number, value)
            else:
                study.tell(number, state=TrialState.FAIL)
            sweep_dir = Path(self.settings.hydra.sweep.dir)
            write_results(sweep_dir, study.trials, objective)
            check_changed(space, sweep_dir / str(number))
        return returns


def check_discrete(arguments: Sequence[str]) -> None:
    """ConfigError for an interval, of which a sweep over all combinations would have no end."""
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        if override.is_interval_sweep():
            raise ConfigError(f"{override.input_line} has no single values to run; add hparams=own to search it.")


def check_used(space: Iterable[str], settings: DictConfig) -> None:
    """ConfigError for keys of an optimizer that the chosen model does not refer to: nothing would be searched."""
    keys = optimizer_keys(space)
    if not keys or "model" in space or refers(OmegaConf.to_container(settings.model, resolve=False)):
        return
    raise unused(keys, f"model={settings.model.get('_target_')}", "takes no ${optimizer}")


def check_changed(space: Iterable[str], run_dir: Path) -> None:
    """ConfigError where the record of a trial says that the module never made the optimizer that is searched."""
    keys, path = optimizer_keys(space), run_dir / "record.json"
    if not keys or not path.is_file():
        return
    record = RunRecord.read(path)
    if record.found is not None and record.found.asked is False and record.found.optimizers:
        raise unused(keys, f"model={record.model}", f"makes its own {record.found.optimizers[0].name}")


def optimizer_keys(space: Iterable[str]) -> list[str]:
    return [key for key in space if key.startswith("optimizer.")]


def refers(section: Any) -> bool:
    """Whether a section whose interpolations are unresolved refers to the optimizer's, or to a key of it."""
    if isinstance(section, dict):
        return any(map(refers, section.values()))
    if isinstance(section, list):
        return any(map(refers, section))
    return isinstance(section, str) and "${optimizer" in section


def unused(keys: Sequence[str], model: str, why: str) -> ConfigError:
    return ConfigError(
        f"hparams: {' and '.join(keys)} would change nothing, as {model} {why}; search keys of the model (hparams=own "
        f"model.lr='interval(1e-4, 1e-2)'), or give it optimizer: ${{optimizer}} and let it make that one."
    )


def section(config: DictConfig, name: str, kind: type[Any]) -> Any:
    """One section of the config, checked before anything starts."""
    try:
        return kind.model_validate(OmegaConf.to_container(config[name], resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; give {error.full_key}=...") from None
    except ValidationError as error:
        raise ConfigError(first_line(error, prefix=name)) from None


def split(params: dict[str, str], arguments: Sequence[str]) -> tuple[list[str], dict[str, BaseDistribution]]:
    """What is the same in every trial, and what is searched; a key of the command line replaces one of `params`."""
    parser = OverridesParser.create()
    given = parser.parse_overrides(list(arguments))
    named = {override.key_or_group for override in given}
    searched = parser.parse_overrides([f"{key}={value}" for key, value in params.items() if key not in named])
    fixed, space = [], {}
    for override in [*given, *searched]:
        if override.is_sweep_override():
            space[override.get_key_element()] = distribution(override)
        else:
            fixed.append(f"{override.get_key_element()}={override.get_value_element_as_str()}")
    return fixed, space


def first_of(distribution: BaseDistribution) -> Any:
    """A value that may be chosen."""
    limits = vars(distribution)
    return limits["choices"][0] if "choices" in limits else limits["low"]


def distribution(override: Override) -> BaseDistribution:
    """A sweep of Hydra's as Optuna has it; ConfigError for an interval that holds nothing to choose."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if not isinstance(value, IntervalSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    low, high = value.start, value.end
    assert low is not None
    assert high is not None
    kind = IntDistribution if isinstance(low, int) and isinstance(high, int) else FloatDistribution
    try:
        return kind(low, high, log="log" in value.tags)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"{override.input_line}: {error}") from None


def open_study(sweep_dir: Path, sampler: str, seed: int) -> Study:
    """The study in the sweep's folder, new or gone on with."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=sweep_dir.name,
        storage=JournalStorage(JournalFileBackend(str(sweep_dir / STUDY))),
        load_if_exists=True,
    )
    seed += len(study.trials)  # a search that goes on does not draw again what it has drawn
    samplers = optuna.samplers
    study.sampler = samplers.TPESampler(seed=seed) if sampler == "tpe" else samplers.RandomSampler(seed=seed)
    return study


def write_results(sweep_dir: Path, trials: Sequence[FrozenTrial], objective: ObjectiveConfig) -> None:
    """Write what the search has found so far."""
    trials = [trial for trial in trials if trial.state.is_finished()]
    completed = [trial for trial in trials if trial.value is not None]
    best = min(completed, key=lambda trial: trial.value, default=None)  # type: ignore[arg-type,return-value]
    results = {
        "name": "optuna",
        "objective": objective.model_dump(),
        "trials": len(trials),
        "failed": [trial.number for trial in trials if trial.value is None],
        "best_trial": best and best.number,
        "best_value": best and best.value,
        "best_params": best and best.params,
    }
    (sweep_dir / RESULTS).write_text(yaml.safe_dump(results, sort_keys=False))


def found_best(sweep_dir: Path) -> bool | None:
    """Print the best trial of the search in this folder; whether there is one, None of a sweep that is no search."""
    path = sweep_dir / RESULTS
    if not path.exists():
        return None
    results = yaml.safe_load(path.read_text())
    failed = results["failed"]
    one_of_them = f"trial {failed[0]}" if len(failed) == 1 else f"trials {', '.join(map(str, failed))}"
    failures = f"{len(failed)} of {results['trials']} failed ({one_of_them})" if failed else "none failed"
    if results["best_trial"] is None:
        print(f"no trial has a {results['objective']['name']}: {failures}")
        return False
    params = " ".join(f"{key}={value}" for key, value in results["best_params"].items())
    value = f"{results['objective']['name']} {results['best_value']:.6g}"
    print(f"best is trial {results['best_trial']} with {value}: {params}; {failures}; see {path}")
    return True
