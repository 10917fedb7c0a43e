"""The first leg: chunked prefill, then the hand-over of the KV."""
