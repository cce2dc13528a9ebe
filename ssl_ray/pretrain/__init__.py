"""Self-supervised pretraining, in the order in which a run uses it.

`driver` starts Ray's workers and `collector` hears from them; each `worker` reads its `stream` of `samples` and has its
`learner` take a step on every batch, while `records` tell what came of it. `tasks` holds what is learned.
"""
