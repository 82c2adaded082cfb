"""Operations on the adapters of one model."""
