"""Where clients come in; owns the transcript of every request."""
