"""The controller's decisions, apart from Ray and from the processes that it decides about."""
