"""`hydra/launcher=subprocess`: every job of a multirun in a process of its own, with a ledger of what was run."""
