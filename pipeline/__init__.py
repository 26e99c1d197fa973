"""Therefore: teach a language model to reason its way to an answer that can be checked.

    YAML + overrides ─▶ Recipe ─▶ Plan[Step] ─▶ launcher ─▶ stage process ─▶ Artifact ─▶ … ─▶ report

The floors, imports going down only (tests/test_layers.py):

    8  __main__                                          the command line
    7  launchers/                                        start processes
    6  plan                                              what runs, and why; no torch
    5  preprocess sft grpo evaluate report export ask    the stages: run(recipe, inputs, out, runtime)
    4  stage                                             the table of stages and the harness
    3  modeling to_gguf generation checkpoints monitor training distributed     torch and its libraries
    2  tasks/ rewards/ answers metrics                   what is asked, and what counts
       answers reads with verdicts quantities expressions units arithmetic reading
    1  recipe cluster artifact progress                  what travels, typed
    0  errors typed fingerprint
"""

__version__ = "0.1.0"
