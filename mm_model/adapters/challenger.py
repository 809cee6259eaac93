"""Follows the alias `challenger`, and says to the endpoint which two versions there are."""

from __future__ import annotations

from dataclasses import dataclass

from mm_model.adapters import mlflow_registry
from mm_model.adapters.champion import ChampionFollower
from mm_model.adapters.mlflow_registry import Champion
from mm_model.api import Refusal
from mm_model.serving.batching import Served


class ChallengerFollower(ChampionFollower):
    """Takes up what the alias `challenger` names, as the champion is taken up.

    It differs in that it need not be there: a version that the alias no longer names, or that has
    become the champion, is unloaded before another is loaded, and none is brought back from the
    cache.
    """

    ALIAS = mlflow_registry.CHALLENGER

    def _look(self) -> Champion | None:
        found = mlflow_registry.challenger(self._model)
        served = self._served
        if found is None:
            self._settled = None
            self._refused.clear()
        if found is None or (served and served.identity.version != str(found.version)):
            self._served = None
        return found

    def _serve_last_good(self) -> None:
        return


@dataclass(frozen=True)
class Followed:
    """A `ModelSource`: the champion, and the challenger if one is followed."""

    champion: ChampionFollower
    challenging: ChallengerFollower | None

    @property
    def served(self) -> Served | None:
        return self.champion.served

    @property
    def challenger(self) -> Served | None:
        return None if self.challenging is None else self.challenging.served

    @property
    def refused(self) -> tuple[Refusal, ...]:
        more = () if self.challenging is None else self.challenging.refused
        return self.champion.refused + more

    @property
    def registry_error(self) -> str | None:
        return self.champion.registry_error
