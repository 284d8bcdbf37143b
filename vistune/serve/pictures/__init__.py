"""Pictures from strangers: bytes checked before anything is decoded, fetched from allowed hosts alone."""
