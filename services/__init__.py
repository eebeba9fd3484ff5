"""Who does the work: one file, one process, one compose service."""

if __name__ != "streamopd.services":
    raise ImportError(f"import this package as 'streamopd.services', not as {__name__!r}")
