"""The judge beside a simulated engine, under any sequence of events: an engine whose answers do not leave does not stay
ready, nor one that cannot be seen, and one that answers is never called unresponsive, however long its prompts are."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pascaline.engines import Progress, WorkLimits
from pascaline.serving.health import ANSWERING, Judge, State

STALL, INTERVAL = 45.0, 15.0
CHUNK, POOL, MAX_RUNNING, HELD_BACK = 100, 4000, 4, 10
LIMITS = WorkLimits(CHUNK, 2.0 * POOL, 2.0 * MAX_RUNNING + 2, 3.0 * HELD_BACK * MAX_RUNNING)
DETECTED_WITHIN = 2 * STALL
"""And as long as the work takes that excuses silence."""
EXCUSING_STEPS = LIMITS.prefill / CHUNK + LIMITS.prompts + LIMITS.decode


@dataclass(eq=False)
class Request:
    """One that the engine has; a test generation has two tokens of prompt and one of answer."""

    prompt: int
    tokens: int
    stream: bool
    computed: int = 0
    generated: int = 0
    handed: int = 0
    answered: bool = False


@dataclass
class Engine:
    """A scheduler that computes prompts in chunks, before anything else, and counts as SGLang does."""

    step_seconds: float
    lost: bool = False
    hung: bool = False
    queue: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    prefilling: Request | None = None
    prefill: int = 0
    decode: int = 0
    prompts: int = 0
    answers: int = 0
    idle: float = 0.0
    spare: float = 0.0

    def run(self, seconds: float) -> None:
        self.spare += seconds
        while not self.hung and self.spare >= self.step_seconds:
            self.spare -= self.step_seconds
            if not self.step():
                self.idle += self.step_seconds

    def step(self) -> bool:
        if self.prefilling is None and self.queue and len(self.running) < MAX_RUNNING:
            self.prefilling = self.queue.pop(0)
            self.prompts += 1
        if (request := self.prefilling) is not None:
            chunk = min(CHUNK, request.prompt - request.computed)
            request.computed += chunk
            self.prefill += chunk
            if request.computed == request.prompt:
                self.prefilling = None
                self.running.append(request)
                self.generate(request)
            return True
        for request in list(self.running):
            self.decode += 1
            self.generate(request)
        return bool(self.running)

    def generate(self, request: Request) -> None:
        request.generated += 1
        ended = request.generated == request.tokens
        if ended:
            self.running.remove(request)
        if not self.lost:
            if request.stream or ended or request.generated % HELD_BACK == 0:
                self.answers += request.generated - request.handed if request.handed else 1
                request.handed = request.generated
            self.answers += request.generated if ended else 0
            request.answered = ended

    def abort(self, request: Request) -> None:
        for where in (self.queue, self.running):
            if request in where:
                where.remove(request)
        self.prefilling = None if request is self.prefilling else self.prefilling

    def page(self) -> Progress:
        """As SGLang's: a prompt that is being computed is neither running nor waiting."""
        total = self.prefill + self.decode
        return Progress(
            total, len(self.running), len(self.queue), self.answers, self.prefill, self.decode, self.prompts, self.idle
        )


class Watched(RuleBasedStateMachine):
    """An engine, its clients, and the judge as the supervisor asks it: once a second."""

    @initialize(step_seconds=st.sampled_from([0.02, 0.1, 1.0, 5.0, 10.0]))
    def start(self, step_seconds: float) -> None:
        self.engine, self.now = Engine(step_seconds), 1000.0
        self.judge = Judge(STALL, last_sign=self.now, limits=LIMITS)
        self.probe: tuple[Request, float] | None = None
        self.broken_since: float | None = None
        self.blind = 0
        self.verdict = State.READY
        self.seen = self.now

    @rule(
        prompt=st.integers(1, POOL // MAX_RUNNING),
        tokens=st.integers(1, 300),
        stream=st.booleans(),
        copies=st.integers(1, 3),
    )
    def submit(self, prompt: int, tokens: int, stream: bool, copies: int) -> None:
        self.engine.queue += [Request(prompt, tokens, stream) for _ in range(copies)]

    @rule()
    def lose_page(self) -> None:
        self.blind = 3

    @rule(seconds=st.integers(20, 500))
    def lack_descriptors(self, seconds: int) -> None:
        """No request leaves the supervisor, and nothing but time passes: the engine goes on."""
        self.engine.run(seconds)
        self.now += seconds
        self.judge.missed(seconds, "descriptors")
        if self.probe is not None:
            self.probe = (self.probe[0], self.probe[1] + seconds)
        if self.broken_since is not None:
            self.broken_since += seconds
        self.verdict = self.judge.verdict(self.now)[0]

    @precondition(lambda self: self.broken_since is None)
    @rule()
    def lose_answers(self) -> None:
        self.engine.lost, self.broken_since = True, self.now

    @precondition(lambda self: self.broken_since is None)
    @rule()
    def hang(self) -> None:
        self.engine.hung, self.broken_since = True, self.now

    @rule(seconds=st.integers(1, 200), every=st.integers(0, 5), prompt=st.integers(1, 60), tokens=st.integers(1, 20))
    def wait(self, seconds: int, every: int, prompt: int, tokens: int) -> None:
        """Time passes; a short request comes every few seconds."""
        for second in range(seconds):
            if every and second % every == 0 and len(self.engine.queue) < 20:
                self.engine.queue.append(Request(prompt, tokens, stream=bool(second % 2)))
            self.tick()

    def tick(self) -> None:
        if self.verdict is State.UNRESPONSIVE:
            return  # the supervisor kills it
        self.engine.run(1.0)
        self.now += 1.0
        self.blind = max(0, self.blind - 1)
        self.judge.observe(self.now, None if self.blind else self.engine.page())
        self.follow_probe()
        if self.probe is None and self.judge.wants_probe(self.now, INTERVAL):
            self.judge.probe_sent()
            self.probe = (Request(2, 1, stream=False), self.now)
            self.engine.queue.append(self.probe[0])
        self.verdict = self.judge.verdict(self.now)[0]
        if self.now in (self.judge.last_sign, self.judge.last_excuse):
            self.seen = self.now

    def follow_probe(self) -> None:
        if self.probe is None:
            return
        request, sent = self.probe
        if request.answered:
            self.judge.probed(self.now)
        elif self.now - sent >= STALL:
            self.judge.probe_failed(with_error=False)
            self.engine.abort(request)
        else:
            return
        self.probe = None

    @invariant()
    def an_engine_that_answers_is_left_alone(self) -> None:
        if getattr(self, "broken_since", None) is None and hasattr(self, "verdict"):
            assert self.verdict is not State.UNRESPONSIVE, self.judge.verdict(self.now)

    @invariant()
    def one_whose_answers_do_not_leave_does_not_stay_ready(self) -> None:
        if getattr(self, "broken_since", None) is None:
            return
        if self.now - self.broken_since > DETECTED_WITHIN + EXCUSING_STEPS * self.engine.step_seconds:
            assert self.verdict is State.UNRESPONSIVE, self.judge

    @invariant()
    def one_that_cannot_be_seen_does_not_stay_ready(self) -> None:
        """Counted silence and seconds that cannot be counted have one stall_timeout each."""
        if getattr(self, "verdict", None) in ANSWERING:
            assert self.now - self.seen <= 2 * STALL, self.judge


TestWatched = Watched.TestCase
TestWatched.settings = settings(
    max_examples=60, stateful_step_count=15, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
