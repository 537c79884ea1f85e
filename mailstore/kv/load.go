package kv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"
)

// Load fills an empty view with the rows of a Dump, by growing key, and sets
// its position to at. Until all of them are on disk the position is 0: after a
// crash in between the view has rows and no position, and Reset must empty it.
// The same goes for an error. It waits while the disk is below its floor.
// Nothing may be read or applied during the call.
func (v *View) Load(ctx context.Context, at uint64, next func() (key, value []byte, ok bool, err error)) error {
	v.mu.RLock()
	m, begun := v.meta, v.applied > 0 || v.ops > 0
	v.mu.RUnlock()
	if begun || at == 0 {
		return fmt.Errorf("load rows of position %d: the view is at %d", at, m.Applied)
	}
	maxBytes, maxOps := v.st.limits()
	var rows []row
	size, last := 0, []byte(nil)
	flush := func() error {
		err := v.commitLoaded(ctx, rows, m)
		rows, size = nil, 0
		return err
	}
	for {
		k, val, ok, err := next()
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if len(val) > MaxValue || len(k) > MaxKey || len(k) == 0 || bytes.Compare(k, last) <= 0 {
			return fmt.Errorf("load rows: a row with a key of %d and a value of %d bytes, or out of order: %w", len(k), len(val), ErrDamaged)
		}
		r := row{key: bytes.Clone(k), value: bytes.Clone(val)}
		last = r.key
		n := len(k) + len(val) + rowCost
		if len(rows) > 0 && (size+n > maxBytes || len(rows)+1 > maxOps) {
			if err := flush(); err != nil {
				return err
			}
		}
		rows, size = append(rows, r), size+n
	}
	if err := flush(); err != nil {
		return err
	}
	m.Applied = at
	if err := v.commitLoaded(ctx, nil, m); err != nil {
		return err
	}
	s, err := v.st.snapshot()
	if err != nil {
		return err
	}
	v.mu.Lock()
	old := v.base
	v.base, v.meta, v.applied, v.durable = v.share(s), m, at, at
	v.wake()
	v.mu.Unlock()
	old.drop()
	return nil
}

func (v *View) commitLoaded(ctx context.Context, rows []row, m meta) error {
	for {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		err := v.room()
		if err == nil {
			err = v.st.commit(rows, m)
		}
		if err == nil && v.files != nil {
			v.files.proven()
		}
		if !errors.Is(err, errFull) {
			return err
		}
		t := time.NewTimer(fullPoll)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		}
	}
}

// Empty reports whether the view has no row.
func (v *View) Empty() (bool, error) {
	empty := true
	err := v.Scan(nil, nil, func(_, _ []byte) bool { empty = false; return false })
	return empty, err
}
