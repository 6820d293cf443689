"""What `llmsup switch` is asked for, as a change of the profile; and what it chose, kept."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from msgspec import structs

from llmsup.config import profiles
from llmsup.config.choice import Choice, is_flagged
from llmsup.config.load import Loaded, load
from llmsup.config.models import find_model
from llmsup.config.overrides import keys_of
from llmsup.config.paths import Paths
from llmsup.config.schema import LlamaServer, Profile
from llmsup.config.wording import quoted
from llmsup.core.service import Service, Want
from llmsup.errors import ConfigError, UsageError
from llmsup.host import choices
from llmsup.units import takes_turns


@dataclass(frozen=True)
class Change:
    """The profile as it is and as it is to be, and the `choice` that makes it so.

    `leaving`: services that are up and give way to the target, in single mode. `generations`: the
    last ones of the services that were wanted up, the target among them if it was.
    """

    target: str
    model: Path
    old: Loaded
    new: Loaded
    choice: Choice
    leaving: tuple[str, ...]
    generations: Mapping[str, int]


def propose(
    target: str,
    model: str | None,
    loaded: Loaded,
    *,
    choice: Choice,
    services: Mapping[str, Service],
    environ: Mapping[str, str],
    home: Paths,
) -> Change:
    """The change that has `target` serve `model`, or what profile and environment say now.

    `choice` is the one so far.

    Raises UsageError for what cannot be meant, and ConfigError for a profile with problems.
    """
    profile = loaded.profile
    spec = _spec(target, profile, home)
    models = {name: file for name, file in choice.models.items() if name != target}
    if model is None:
        file = _expected(target, Choice(choice.active, models), loaded, environ, home)
    else:
        file = _file(model, loaded)
        models[target] = str(file)
    is_single = target in takes_turns(profile)
    flags = keys_of(loaded.overrides)
    for key, is_changed in (
        (("service", target, "model"), str(file) != spec.model),
        (("active",), is_single and profile.active != target),
    ):
        if is_changed and is_flagged(key, flags):
            raise UsageError(
                f"--set says what {'.'.join(key)} is", hint="llmsup stop, then start without it"
            )
    chosen = Choice(target if is_single else choice.active, models)
    return _change(target, spec, file, loaded, choice=chosen, services=services)


def propose_swap(
    target: str, loaded: Loaded, *, choice: Choice, services: Mapping[str, Service]
) -> Change:
    """The change that has `target` take the place of the model that is up, in single mode.

    Each keeps the model that it has. Raises UsageError where a flag says which one is up.
    """
    if is_flagged(("active",), keys_of(loaded.overrides)):
        raise UsageError("--set says what active is", hint="llmsup stop, then start without it")
    spec = loaded.profile.service[target]
    if not isinstance(spec, LlamaServer):
        raise UsageError(f"{target} has no model to be switched")
    chosen = structs.replace(choice, active=target)
    return _change(target, spec, Path(spec.model), loaded, choice=chosen, services=services)


def _change(
    target: str,
    spec: LlamaServer,
    file: Path,
    loaded: Loaded,
    *,
    choice: Choice,
    services: Mapping[str, Service],
) -> Change:
    profile = loaded.profile
    is_single = target in takes_turns(profile)
    new_profile = structs.replace(
        profile,
        active=target if is_single else profile.active,
        service=profile.service | {target: structs.replace(spec, model=str(file))},
    )
    new = replace(loaded, profile=new_profile)
    return as_of(Change(target, file, loaded, new, choice, (), {}), services)


def as_of(change: Change, services: Mapping[str, Service]) -> Change:
    """The change as it is with these services."""
    target, profile = change.target, change.old.profile
    takers = takes_turns(profile)
    up = [name for name, service in services.items() if service.want is Want.UP]
    leaving = tuple(name for name in up if target in takers and name in takers and name != target)
    generations = {
        name: services[name].generation for name in up if name in leaving or name == target
    }
    return replace(change, leaving=leaving, generations=generations)


def profile_file(target: str, model: str | None, loaded: Loaded, home: Paths) -> Path | None:
    """The file of the profile that `target` names; None where it names none, or a service.

    Raises UsageError for one that cannot be switched to from here.
    """
    if target in loaded.profile.service:
        return None
    try:
        path = profiles.find(target, home.config)
    except ConfigError:
        return None
    if model is not None:
        raise UsageError(f"--model is for a service, and {target} is a profile")
    if loaded.overrides and path != loaded.path:
        options = " ".join(f"--set {text}" for text in loaded.overrides)
        raise UsageError(
            f"{loaded.name} is up with {options}, which no other profile gets",
            hint=f"llmsup stop, then llmsup start {target}",
        )
    return path


def _spec(target: str, profile: Profile, home: Paths) -> LlamaServer:
    spec = profile.service.get(target)
    if isinstance(spec, LlamaServer):
        return spec
    known = [name for name, each in profile.service.items() if isinstance(each, LlamaServer)]
    hint = f"services with a model: {', '.join(known) or 'none'}"
    if spec is not None:
        raise UsageError(f"{target} has no model to be switched", hint=hint)
    others = ", ".join(each.name for each in profiles.available(home.config))
    raise UsageError(f"no service or profile {quoted(target)}", hint=f"{hint}; profiles: {others}")


def _expected(
    target: str, choice: Choice, loaded: Loaded, environ: Mapping[str, str], home: Paths
) -> Path:
    """The model file of the profile as it is now; the environment is that of the daemon."""
    source = str(loaded.path)
    fresh = load(
        source,
        environ=environ,
        overrides=loaded.overrides,
        config_dir=home.config,
        choices={source: choice},
    )
    spec = fresh.profile.service.get(target)
    if not isinstance(spec, LlamaServer):
        raise UsageError(f"{target} has no model in the profile any more", hint="llmsup reload")
    return Path(spec.model)


def _file(model: str, loaded: Loaded) -> Path:
    try:
        return find_model(model, loaded.profile.models.dirs, loaded.path.parent)
    except ValueError as error:
        raise UsageError(
            str(error), hint="name a GGUF file; llmsup profile show has models.dirs"
        ) from None


class Chosen:
    """What was chosen over one profile, and its file."""

    def __init__(self, path: Path, profile_path: str) -> None:
        self._path = path
        self._profile_path = profile_path
        self._choices = choices.load(path)

    @property
    def choice(self) -> Choice:
        """It; `unfinished` where an earlier daemon did not come to the end of a switch."""
        return self._choices.of(self._profile_path)

    def begin(self, service: str, generation: int) -> None:
        """A service is switched, and from this generation on nothing has proved itself.

        Whoever finds this undoes it. Raises OSError.
        """
        self._keep(structs.replace(self.choice, unfinished={service: generation}))

    def end(self, choice: Choice | None = None) -> None:
        """The switch is over; what is chosen is this, or what was before it. Raises OSError."""
        self._keep(structs.replace(choice or self.choice, unfinished={}))

    @property
    def trial(self) -> choices.Trial | None:
        """A switch to another profile that is not over."""
        return self._choices.trial

    def try_out(self, trial: choices.Trial) -> None:
        """A switch to another profile is as far as that. Raises OSError."""
        self._save(structs.replace(self._choices, trial=trial))

    def end_trial(self, profile: str | None = None) -> None:
        """It is over; the profile is chosen from now on (None: what was before). Raises OSError."""
        kept = self._choices.profile if profile is None else profile
        self._save(structs.replace(self._choices, trial=None, profile=kept))

    def last_load_s(self, model: Path) -> float | None:
        """How long the file took to load the last time."""
        return self._choices.load_s.get(str(model))

    def note_load(self, model: Path, load_s: float) -> None:
        """It took so long. Raises OSError."""
        self._save(self._choices.with_load(str(model), load_s))

    def _keep(self, choice: Choice) -> None:
        self._save(self._choices.with_choice(self._profile_path, choice))

    def _save(self, after: choices.Choices) -> None:
        choices.save(self._path, after)
        self._choices = after
