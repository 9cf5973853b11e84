"""What is written of a step: its metrics, where it is logged, in metrics.jsonl and on the terminal."""

from __future__ import annotations

from dspref.data.loader import Step
from dspref.report.metrics import Displacement, Meter, Sources
from dspref.report.performance import Account, Clock
from dspref.training.gradient import Instruments
from dspref.training.numbers import Spikes, Suspects, check_first_step, check_loss
from dspref.training.session import Session


class StepRecords:
    """What looks on while the steps of a session are taken, and writes of them. Made, and called, on all ranks alike."""

    def __init__(self, session: Session, steps: int, tokens: int) -> None:
        """`steps`: the number of the last one, which is logged whatever `log.every` says; `tokens`: of the steps before."""
        device, labels = session.policy.device, session.sources
        sources = Sources(labels, session.pairs.source_rows, device) if len(labels) > 1 else None
        self._tokens = tokens
        self.suspects = Suspects()
        self._session, self._steps = session, steps
        self._meter, self._clock = Meter(device, session.loss.router_coef, sources), Clock(device)
        self._account = Account.of(session.model, session.policy, session.reference, session.loss.looks_ahead)
        self._displacement, self._spikes = Displacement(), Spikes(session.train.spike_sigmas)

    def is_logged(self, number: int) -> bool:
        return number in (1, self._steps) or number % self._session.log_every == 0

    def begin(self, number: int) -> Instruments:
        """What looks on in this step."""
        self._session.watch.beat("batches", number)
        self.suspects.clear()
        meter = self._meter if self.is_logged(number) else None
        return Instruments(meter, self._clock, self.suspects, self._session.watch.beat, self._session.profile)

    def write(self, step: Step, learning_rate: float, grad_norm: float) -> None:
        """The record of a step that was taken. Raises NumericFault where its numbers cannot be believed."""
        session = self._session
        session.profile.phase("record")
        self._tokens += step.counts["tokens"]
        if self.is_logged(step.number):
            applied, means = session.policy.applied, self._meter.reduce()
            check_loss(step.number, means["loss"], applied)
            if step.number == 1:
                check_first_step(means, session.first_step_tolerance, applied)
            record = header(step.number, step.epoch) | {"loss": means.pop("loss"), "grad_norm": grad_norm}
            record |= {"learning_rate": learning_rate, **means, "num_tokens": self._tokens}
            if not session.profile.covers(step.number):  # which is slower than others, and would pass for the run's speed
                record |= {**self._account.record(step, self._clock.read())}
            session.recorder.write(record)
            session.view.show(step.number, record)
            for warning in (self._displacement.watch(record), self._spikes.watch(step.number, record["loss"])):
                if warning:
                    session.view.note(warning)
        session.view.advance(step.number)
        session.profile.end()

    def end(self, number: int) -> None:
        """What was due after step `number` is done; the time of the next one begins."""
        self._session.profile.write()
        self._clock.start()
        if number < self._steps:
            self._session.profile.begin(number + 1)


def header(step: int, epoch: float) -> dict[str, float]:
    return {"step": step, "epoch": round(epoch, 6)}
