"""Small things that every layer uses: files, progress, errors."""
