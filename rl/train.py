"""RL with verifiable rewards, top to bottom. `cabochon rl RECIPE` runs `main`; docs/rl.md is the user's side.

A step: groups of completions are drawn by the engine and judged as they finish; verdicts and reward models become one
reward each; the algorithm's advantages and one or more updates follow; the engine takes the new weights over. With
`rollout.max_lag` groups stay in flight while the learner learns, and go on with the new weights when they come.

This and `evaluate.py` are the only files of `rl` that know other rooms.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from cabochon import metrics, overrides, parallel
from cabochon.chat import as_turns
from cabochon.errors import MachineError, UserError
from cabochon.learner import Learner
from cabochon.model import convert
from cabochon.model.address import resolve
from cabochon.model.config import ModelConfig
from cabochon.model.hf_export import refuse_unexportable
from cabochon.policy import Policy, learner_config, model_config, open_policy, open_tokenizer
from cabochon.protocols import Reward, StreamingEngine, Weights
from cabochon.reward.open import JudgeRun, is_endpoint, open_reward, usage_of
from cabochon.reward.scorer import ModelReward
from cabochon.rl import journal, reports
from cabochon.rl.advantages import Advantages
from cabochon.rl.alarms import check as check_alarms
from cabochon.rl.evaluate import accuracies, answer, distinct, first_of_each
from cabochon.rl.feed import Feed
from cabochon.rl.learning import (
    Learners,
    advantages_of,
    kl_of,
    learn,
    measure,
    merged,
    published_by,
    reference_of,
    weights_of,
)
from cabochon.rl.losses import adapted_coef
from cabochon.rl.progress import Progress, begin, check_steps, results, told
from cabochon.rl.recipe import RlConfig
from cabochon.rl.rewards import Component, Rewards, scored
from cabochon.rl.update import Update, plan_update
from cabochon.rl.worth import rewarded, worth_learning
from cabochon.rollouts.collect import Collected, Collector, Completions, Group, room
from cabochon.rollouts.environment import EpisodeLimits
from cabochon.rollouts.episodes import EpisodeEngine
from cabochon.rollouts.local import LocalEngine
from cabochon.rollouts.named import environment_at
from cabochon.rollouts.openai import open_endpoint
from cabochon.rollouts.prompts import encode_prompt
from cabochon.rollouts.slots import SlotConfig
from cabochon.rollouts.stream import LocalStream
from cabochon.rollouts.tools import Tool, ToolEnvironment, calculator, python
from cabochon.run import Run, open_run
from cabochon.tokenizer import Tokenizer
from cabochon.types import Rollout, Task
from cabochon.verifiers.build import probes_for, python_runner, sandbox_named, verifier_for
from cabochon.verifiers.format import ThinkingFormat
from cabochon.verifiers.pool import VerifierPool
from cabochon.verifiers.tasks import spelled

SHOWN = ("reward", "score", "entropy", "tokens", "truncated", "w_gap", "held_out")
"""what the console shows of a step"""


def main(cfg: RlConfig, *, resume_anyway: bool = False) -> Path:
    """Train, and return the directory with the result. The same call again goes on where it stopped.

    Raises UserError (recipe, tasks, directory), MachineError (disk, workers, graders), NonFiniteError, and
    KeyboardInterrupt after Ctrl-C saved a checkpoint.
    """
    if resume_anyway:
        check_steps(cfg)
    addresses = [cfg.model.address, *(m.address for m in cfg.models.values() if not is_endpoint(m.address))]
    # a model that was trained anew is another input at the same place
    files = [*cfg.tasks.train, *cfg.tasks.held_out, *(str(resolve(a).path) for a in addresses if a is not None)]
    with open_run(cfg, "rl", data=files, resume_anyway=resume_anyway, shown=SHOWN) as run, ExitStack() as stack:
        if run.finished:
            return run.final

        # -- tasks, models, steps --------------------------------------------------------------------------------------
        tasks, held = tasks_of(cfg)
        mesh = parallel.mesh_of(cfg.mesh)
        policy = open_policy(cfg.model, cfg.seed, mesh)
        refuse_unexportable(policy.config)
        update = plan_update(cfg.update, sparse=policy.config.moe is not None)
        learners = learners_of(cfg, update, mesh)

        # -- fresh states, or those that were saved --------------------------------------------------------------------
        reference = reference_of(learners.policy, policy.params) if update.needs_reference else None
        states, done, progress = begin(run, cfg, learners, policy.params)
        policy = replace(policy, params={})  # the learner has its copy, a reference its own hold: memory to be freed
        verifiers = stack.enter_context(verifiers_of(cfg, [*tasks, *held]))
        policy.tokenizer.save(run.dir / "tokenizer")  # for those who read rollouts/
        phases = cfg.reached
        feed = Feed(
            tasks, [p.tasks.shares for p in phases], cfg.seed, curriculum=cfg.tasks.curriculum,
            places=progress.places, rates=progress.rates, unfinished=progress.unfinished,
        )  # fmt: skip
        if feed.gone:
            run.event("changed", f"{len(feed.gone)} tasks that were in flight are in no file now: {feed.gone[0]}, ...")
        engine = engine_of(cfg, policy, weights_of(learners.policy, states, done), run, stack)
        drawn = cfg.sampling.drawn(cfg.rollout.group_size, routes=update.replays_sampler)
        source = Completions(engine, drawn, chat=cfg.tasks.chat)
        collector = stack.enter_context(
            Collector(
                source, verifiers, seed=cfg.seed, first_group=progress.next_group, threads=cfg.tasks.verifying
            )
        )  # fmt: skip
        scorers = scorers_of(cfg, run)
        watch, kl_coef, alarmed = reports.Stopwatch(), progress.kl_coef, progress.alarms
        published = published_by(learners.policy, states)

        def held_out() -> dict[str, Any]:
            if not held:
                return {}
            drawn = phases[-1].sampling.drawn(cfg.eval.samples)  # always alike, as the result is to be used
            with watch("eval"):
                found = accuracies(answer(engine, verifiers, asked, drawn, cfg.seed, chat=cfg.tasks.chat))
            return {"held_out": found["all"], "held_out_domains": found}

        def save(step: int) -> None:
            now = Progress(
                places=feed.places, rates=feed.rates, next_group=collector.next_group,
                unfinished=[*collector.unfinished, *feed.again], kl_coef=kl_coef, alarms=alarmed, before=before,
            )  # fmt: skip
            run.save(step, states._asdict(), asdict(now))

        if cfg.eval.every and not held:
            run.event("held out", "tasks.held_out names no file: nothing is evaluated, eval.every is not used")
        asked, before, last = first_of_each(held, cfg.eval.tasks), progress.before, cfg.steps
        if held and done == 0:
            before = held_out()["held_out_domains"]
            run.event("held out", told(before), step=0, data={"held_out": before, "tasks": len(asked)})
            watch.take()

        # -- the loop --------------------------------------------------------------------------------------------------
        for step in run.steps(done, cfg.steps):
            feed.phase = cfg.phase(step)
            now = phases[feed.phase]
            with watch("rollouts"):
                source.sampling = now.sampling.drawn(cfg.rollout.group_size, routes=update.replays_sampler)
                want = room(
                    max_lag=cfg.rollout.max_lag, batch=cfg.rollout.prompts, waiting=collector.waiting,
                    running=collector.in_flight, most=(cfg.rollout.max_lag + 1) * cfg.rollout.prompts,
                )  # fmt: skip
                collector.start([next(feed) for _ in range(want)])
                got = collector.take(
                    cfg.rollout.prompts, more=feed, max_lag=cfg.rollout.max_lag,
                    keep=partial(kept, now, update),
                    refills=cfg.rollout.refills * cfg.rollout.prompts,
                )  # fmt: skip
            if not got.rollouts:
                empty, why = unlearnt(run, now, got, step, update)
                if step > 1:  # before, nothing was learnt, and who mends the recipe runs the same command again
                    run.log(step, empty | ({} if why and step < cfg.steps else held_out()), clock=watch.take())
                    save(step)
                if why:
                    raise why
                last = step
                break
            rollouts = got.rollouts
            feed.observe([r for g in (*got.groups, *got.dropped, *got.stale) for r in g.rollouts])
            with watch("score"):
                said = {name: scorer.score(rollouts) for name, scorer in scorers.items()}
                models = {n: scored(s, logit=isinstance(scorers[n], ModelReward)) for n, s in said.items()}
                rewards = rewarded(now, rollouts, models, format_=formats(now, rollouts), overlong=update.overlong)
                known = measure(learners, states, reference, rollouts, cfg.update, update)
                penalties, kl = kl_of(cfg.update, known, rollouts, kl_coef)
                advantages = advantages_of(rollouts, rewards.reward_N, known, update, penalties)
            with watch("update"):
                rng = np.random.default_rng((cfg.seed, step))
                warming = states.critic is not None and int(states.critic.step) < update.warmup_updates
                learnt = learn(
                    learners, states, rollouts, advantages, known, cfg.update, update, rng, critic_only=warming
                )
                states = learnt.states
            with watch("sync"):
                engine.load(weights_of(learners.policy, states, step))
                before_update, published = published, published_by(learners.policy, states)
            row = {**row_of(got, rollouts, rewards, step), **learnt.row, **feed.row(), **collector.row()}
            if cfg.phases:
                row["phase"] = cfg.phases[feed.phase - 1].name if feed.phase else "first"
            if not warming:
                row["weights_change"] = float((published != before_update).mean())
            replayed = update.replays_sampler or update.needs_routes
            if learnt.router is not None:
                row["moe"] = metrics.router_row(learnt.router, replayed=replayed)
            if kl is not None:
                row["kl_reward"], row["kl_coef"] = kl, kl_coef
                kl_coef = adapted_coef(kl_coef, kl, cfg.update.kl, len(rollouts))
            if step == cfg.steps or (cfg.eval.every and step % cfg.eval.every == 0):
                row |= held_out()
            rows = journal.rollout_rows(rollouts, rewards, advantages, said, learnt.tokens)
            journal.write_rollouts(run.dir / "rollouts", step, rows)
            if cfg.samples_every and (step == 1 or step % cfg.samples_every == 0):
                run.console.line(journal.table(rows))
            asked_of = {f"endpoint_{name}": used for name, s in scorers.items() if (used := usage_of(s))}
            timed = {**watch.take(), "verify_seconds": reports.verify_seconds(rollouts), **asked_of}
            experts = metrics.expert_row(learnt.router, replayed=replayed)
            run.log(step, row, clock=timed, experts=experts)
            alarms, alarmed = check_alarms(row, step, alarmed, cfg.alarms)
            for alarm in alarms:
                run.event("alarm", str(alarm), step=step, data={"alarm": alarm.name})
            if step == cfg.steps or run.save_due(step):
                save(step)
            if alarms and cfg.fail_on_alarm:
                raise MachineError(f"{run.dir}: stopped by fail_on_alarm: {alarms[0]}")

        # -- the result ------------------------------------------------------------------------------------------------
        convert.save(
            run.final, policy.config, merged(learners.policy, states), tokenizer=policy.tokenizer, overwrite=True
        )
        run.finish(steps=last, results=results(run, before), parents=[m.address for m in cfg.models.values()])
        return run.final


# -- making the parts --------------------------------------------------------------------------------------------------


def tasks_of(cfg: RlConfig) -> tuple[list[Task], list[Task]]:
    """(training, held-out). Raises UserError where a held-out prompt is trained on, an id is used twice in either, or a
    prompt leaves no room for its completion."""
    train = distinct(cfg.tasks.train, "tasks.train")
    cfg.check_tasks(train)
    held = distinct(cfg.tasks.held_out, "tasks.held_out")
    trained = {spelled(t.prompt): t.id for t in train}
    for task in held:
        if (same := trained.get(spelled(task.prompt))) is not None:
            raise UserError(
                f"tasks.held_out: {task.id!r} has the prompt of the training task {same!r}; remove one of them"
            )
    if cfg.environment is None:  # which makes the prompt of it, when an episode begins
        check_room(cfg, train, held)
    return train, held


def check_room(cfg: RlConfig, train: Sequence[Task], held: Sequence[Task]) -> None:
    """Raises UserError naming a task whose prompt and completion do not fit in a phase it is drawn or finished in."""
    tokenizer, positions = open_tokenizer(cfg.model), model_config(cfg.model).max_positions
    limit = "engine.length" if cfg.engine.length <= positions else "the model's max_positions"
    room, last = min(cfg.engine.length, positions), cfg.reached[-1:]
    drawing = {domain: cfg.phases_of(domain) for domain in {task.domain for task in train}}
    for where, tasks in (("train", train), ("held_out", held)):
        for task in tasks:
            size = len(encode_prompt(tokenizer, as_turns(task.prompt, cfg.tasks.chat)))
            drawn = last if where == "held_out" else drawing[task.domain]
            most = max((p.sampling.max_tokens for p in drawn), default=0)
            if most and size + most > room:
                raise UserError(
                    f"tasks.{where}: task {task.id!r}: the prompt's {size} tokens and max_tokens={most} do not fit in "
                    f"{limit}={room}: shorten it, leave it out, or raise {limit} to {size + most}"
                )


def verifiers_of(cfg: RlConfig, tasks: Sequence[Task]) -> VerifierPool:
    """Those the tasks ask for, proved. Raises GradingBroken."""
    verifier = verifier_for(tasks, sandbox=cfg.tasks.sandbox)
    return VerifierPool(verifier=verifier, probes=probes_for(tasks), concurrency=cfg.tasks.verifying)


def learners_of(cfg: RlConfig, update: Update, mesh: Mesh | None) -> Learners:
    """The policy's step, and that of a critic with a trunk of its own."""
    shape = replace(
        learner_config(cfg, entropy=True), value=update.critic == "shared", freeze_router=cfg.update.router.freeze,
        temperature=cfg.sampling.temperature,
    )  # fmt: skip
    critic = None
    if update.critic == "own":
        assert update.critic_loss is not None
        rate = cfg.optim.learning_rate if update.critic_rate is None else update.critic_rate
        optim = cfg.optim.model_copy(update={"learning_rate": rate})
        own = replace(shape, optim=optim, value=True, entropy=False, lora=None)
        critic = Learner(own, update.critic_loss, mesh)
    return Learners(policy=Learner(shape, update.loss, mesh), critic=critic)


def slot_config(cfg: RlConfig) -> SlotConfig:
    """Of each engine that samples."""
    return SlotConfig(
        slots=cfg.engine.slots,
        length=cfg.engine.length,
        dtype=cfg.precision.compute,
        cache_dtype=cfg.precision.compute,
        reuse=cfg.engine.reuse,
        tensor=cfg.engine.tensor,
    )


def engine_of(cfg: RlConfig, policy: Policy, weights: Weights, run: Run, stack: ExitStack) -> StreamingEngine:
    """Who draws completions, or episodes where there is an environment; what it starts ends with the stack."""
    engine = turns_of(cfg, policy, weights, run, stack)
    if (env := cfg.environment) is None:
        return engine
    limits = EpisodeLimits(
        turns=env.turns, tokens=cfg.engine.length, seconds=env.seconds, observation_chars=env.observation_chars,
        parallel=env.parallel,
    )  # fmt: skip
    if env.address:
        return stack.enter_context(
            closing(EpisodeEngine(engine, policy.tokenizer, environment_at(env.address), limits))
        )
    tools: list[Tool] = []
    for name in env.tools:
        if name == "python":
            sandbox = stack.enter_context(closing(sandbox_named(cfg.tasks.sandbox)))
            tools.append(python(python_runner(sandbox)))
        else:
            tools.append(calculator())
    made = EpisodeEngine(engine, policy.tokenizer, lambda task: ToolEnvironment(tools, system=env.system), limits)
    return stack.enter_context(closing(made))


def turns_of(cfg: RlConfig, policy: Policy, weights: Weights, run: Run, stack: ExitStack) -> StreamingEngine:
    """Ray's workers, which end with the stack, or this process."""
    slots = slot_config(cfg)
    if cfg.engine.kind == "local":
        return LocalStream(LocalEngine(policy.config, policy.tokenizer, weights, slots))
    from cabochon.rollouts.ray_engine import RayEngine

    engine = RayEngine(
        policy.config, policy.tokenizer, weights, slots, cfg.engine.ray, log_dir=run.dir / "ray",
        on_event=lambda event: run.event(
            "engine", ": ".join(str(event[k]) for k in ("event", "worker", "why") if k in event), data={"detail": event}
        ),
    )  # fmt: skip
    return stack.enter_context(engine)


def scorers_of(cfg: RlConfig, run: Run) -> dict[str, Reward]:
    """The reward models by name; their ids go into the run's events."""

    def engine(model: ModelConfig, params: Any, tokenizer: Tokenizer, length: int) -> LocalEngine:
        slots = SlotConfig(slots=cfg.engine.slots, length=length)
        return LocalEngine(model, tokenizer, Weights(version=0, params=params), slots)

    made: dict[str, Reward] = {}
    for name, scorer in cfg.models.items():
        made[name] = open_reward(scorer.address, overrides.load(JudgeRun, [scorer.judge]), engine, open_endpoint)
        run.event("reward model", f"{name}: {scorer.address}", data={"name": name, "model_id": made[name].model_id})
    return made


def formats(cfg: RlConfig, rollouts: Sequence[Rollout]) -> Component | None:
    """Whether the thinking tags are in order, where the recipe makes that cost something: of completions that had a
    thinking budget, or whose prompt (an environment's system message with it) names the tag."""
    if not cfg.reward.format_penalty:
        return None
    told = cfg.environment.system if cfg.environment else ""
    asked = [cfg.sampling.thinking is not None or "<think>" in f"{told}{r.task.prompt}" for r in rollouts]
    verdicts = [ThinkingFormat().verify(r.task, r.completion.text) for r in rollouts]
    return Component(value_N=np.array([v.score for v in verdicts], float), asked_N=np.array(asked, bool))


# -- parts of a step ---------------------------------------------------------------------------------------------------


def kept(cfg: RlConfig, update: Update, group: Group) -> bool:
    return not update.dynamic_sampling or worth_learning(cfg, group.rollouts)


def row_of(got: Collected, rollouts: Sequence[Rollout], rewards: Rewards, step: int) -> dict[str, Any]:
    """Of metrics.jsonl: what a step drew, and of it (`rollouts`) what it looks at."""
    dropped = [r for g in got.dropped for r in g.rollouts] if got.rollouts else []
    return {
        **reports.rollout_row(rollouts, rewards, step, dropped),
        **reports.group_row(rollouts, rewards, dropped),
        "groups_dropped": len(got.dropped),
        "groups_stale": len(got.stale),
    }


def unlearnt(
    run: Run, cfg: RlConfig, got: Collected, step: int, update: Update
) -> tuple[dict[str, Any], UserError | MachineError | None]:
    """The row of a step that has no group to learn from, and what is wrong: nothing where a run that has learnt has
    nothing left to learn. What was drawn is written as in any other step, reward models alone are not asked."""
    rollouts = [r for g in got.dropped or got.stale for r in g.rollouts]
    rewards = rewarded(cfg, rollouts, {}, format_=formats(cfg, rollouts), overlong=update.overlong)
    flat = [np.zeros(len(r.completion.tokens), np.float32) for r in rollouts]
    none = Advantages(tokens=flat, keep_N=np.zeros(len(rollouts), bool))
    journal.write_rollouts(run.dir / "rollouts", step, journal.rollout_rows(rollouts, rewards, none, {}, {}))
    row = row_of(got, rollouts, rewards, step) | {"kept": 0}
    if step > 1 and cfg.phase(cfg.steps) == cfg.phase(step) and got.dropped and reports.all_solved(rollouts):
        run.event("solved", f"every group is solved at step {step}: nothing left to learn", step=step)
        return row, None
    return row, reports.nothing_to_learn(step, rollouts if got.dropped else [], len(got.stale))
