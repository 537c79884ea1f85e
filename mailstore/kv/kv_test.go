package kv_test

import (
	"context"
	"testing"

	"posthouse/mailstore/kv"
	"posthouse/mailstore/kv/kvtest"
)

type memory struct{ kept kv.Memory }

func (m *memory) Open(o kv.Options) (*kv.View, error) {
	o.Memory, o.Kept = true, &m.kept
	return kv.Open(context.Background(), o)
}

type folder struct{ dir string }

func (f folder) Open(o kv.Options) (*kv.View, error) {
	o.Dir, o.Ballast, o.MemTable = f.dir, -1, 4<<20
	return kv.Open(context.Background(), o)
}

func TestMemoryConforms(t *testing.T) {
	kvtest.Run(t, func(testing.TB) kvtest.Place { return &memory{} })
}

func TestBadgerConforms(t *testing.T) {
	kvtest.Run(t, func(tb testing.TB) kvtest.Place { return folder{tb.TempDir()} })
}
