"""The policy: building, loading and saving it (`load`), and its router (`router`)."""
