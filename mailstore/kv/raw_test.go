package kv

import (
	"log/slog"

	"github.com/dgraph-io/badger/v4"
)

// The tests' own way past the store, to leave what a crash would.

func badgerOpenRaw(dir string) (*badger.DB, error) {
	return badger.Open(badgerOptions(dir, 4<<20, slog.New(slog.DiscardHandler), func() {}))
}

func setRaw(db *badger.DB, key, value []byte) error {
	return db.Update(func(t *badger.Txn) error { return t.Set(key, value) })
}
