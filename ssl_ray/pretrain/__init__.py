"""Self-supervised pretraining, in the order in which a run uses it.

`driver` starts Ray's workers and hears from them; each `worker` reads its `stream` of `samples`, has its `learner` take
a step on every batch, and reports what came of it. `tasks` holds what is learned.
"""
