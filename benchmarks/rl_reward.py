"""The reward of benchmarks/rl.py, in TRL's form, which cabochon takes as it is: 1 for the right answer, else 0."""


def exact(prompts, completions, answer, **_):
    return [float(said.strip() == right) for said, right in zip(completions, answer, strict=True)]
