"""What the shells of all processes share: mailboxes, clocks, loops."""
