"""Which of a run's optimizer steps are left out of its times, and which are traced. Pure arithmetic."""


def warmup_steps(steps: int) -> int:
    """How many of a run's optimizer steps are left out of its times: WARMUP_RULE as a number."""
    return min(10, max(2, steps // 10))


def traced_steps(first: int, last: int, count: int) -> range:
    """Which of a run's optimizer steps `first` to `last` are traced: `count` behind the warm-up, if others are left.

    Else the last one.
    """
    if not count or last < first:
        return range(0)
    begin = first + warmup_steps(last - first + 1)
    return range(begin, begin + count) if begin + count <= last else range(last, last + 1)


def check_untraced(disturbed: range, traced: range, last: int) -> None:
    """ValueError if a profiler that disturbs some steps of a run up to `last` would do so in those that are traced."""
    if not (both := set(traced) & set(disturbed)):
        return
    advice = "set trainer.trace_steps=0, or raise trainer.max_steps"
    if traced.stop + len(disturbed) - 1 <= last:
        advice = f"set profile.first_step={traced.stop + 1} or higher, or trainer.trace_steps=0"
    raise ValueError(
        f"profile.first_step: step {min(both)} is timed for trace.json, which a profiler would disturb; {advice}."
    )
