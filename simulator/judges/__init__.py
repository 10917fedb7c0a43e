"""Parts of the checker, each of which judges some of the promises."""
