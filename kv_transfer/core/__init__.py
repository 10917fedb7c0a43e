"""The decisions of a transfer: plan, session, frames."""
