package kv

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/dgraph-io/badger/v4"
)

// part returns how much of rows fits into one transaction.
func (s *badgerStore) part(rows []row) []row {
	n := 0
	for i, r := range rows {
		if n += len(r.key) + len(r.value) + rowCost; i > 0 && (n > s.maxBytes || i+1 > s.maxOps) {
			return rows[:i]
		}
	}
	return rows
}

// commitBig writes more rows than one transaction takes, and still all or none:
// first as redo rows, then a meta row that says that they count, then the rows
// themselves, then the new position. After a crash in between, begin ends it;
// after errFull the same call again does.
func (s *badgerStore) commitBig(rows []row, m meta) error {
	old, ok, err := s.read()
	if err != nil {
		return err
	}
	if !ok {
		old = badgerMeta{meta: meta{ID: m.ID, Target: m.Target}}
	}
	old.Target = m.Target
	n := uint32(0)
	buf := make([]byte, 0, MaxValue)
	flush := func() error {
		val := bytes.Clone(buf)
		buf = buf[:0]
		n++
		if err := s.prepare(); err != nil {
			return err
		}
		return s.txn(func(t *badger.Txn) error { return t.Set(redoKey(n-1), val) })
	}
	for _, r := range rows {
		if size := 1 + 2*binary.MaxVarintLen32 + len(r.key) + len(r.value); len(buf) > 0 && len(buf)+size > MaxValue {
			if err := flush(); err != nil {
				return err
			}
		}
		buf = appendRow(buf, r)
	}
	if err := flush(); err != nil {
		return err
	}
	old.redo, old.redoSeq = n, m.Applied
	if err := s.txn(func(t *badger.Txn) error { return setMeta(t, old) }); err != nil {
		return err
	}
	return s.carryOut(rows, old)
}

// carryOut writes the rows of a redo and the position after it.
func (s *badgerStore) carryOut(rows []row, m badgerMeta) error {
	for len(rows) > 0 {
		part := s.part(rows)
		rows = rows[len(part):]
		if err := s.prepare(); err != nil {
			return err
		}
		if err := s.txn(func(t *badger.Txn) error { return setRows(t, part) }); err != nil {
			return err
		}
	}
	return s.txn(func(t *badger.Txn) error {
		for i := range m.redo {
			if err := t.Delete(redoKey(i)); err != nil {
				return err
			}
		}
		m.Applied, m.redo, m.redoSeq = m.redoSeq, 0, 0
		return setMeta(t, m)
	})
}

// redo carries out what a crash interrupted.
func (s *badgerStore) redo(m badgerMeta) (badgerMeta, error) {
	var rows []row
	err := s.db.View(func(t *badger.Txn) error {
		for i := range m.redo {
			it, err := t.Get(redoKey(i))
			if err != nil {
				return fmt.Errorf("redo row %d of %d: %w", i, m.redo, ErrDamaged)
			}
			b, err := it.ValueCopy(nil)
			if err != nil {
				return asDamage(err)
			}
			for len(b) > 0 {
				var r row
				if r, b, err = cutRow(b); err != nil {
					return err
				}
				rows = append(rows, r)
			}
		}
		return nil
	})
	if err != nil {
		return m, err
	}
	if err := s.carryOut(rows, m); err != nil {
		return m, err
	}
	m.Applied, m.redo, m.redoSeq = m.redoSeq, 0, 0
	return m, nil
}

// clearRedo removes redo rows that no meta row counts.
func (s *badgerStore) clearRedo() (err error) {
	defer caught(&err)
	var keys [][]byte
	err = s.db.View(func(t *badger.Txn) error {
		o := badger.DefaultIteratorOptions
		o.PrefetchValues, o.Prefix = false, []byte{keyRedo}
		it := t.NewIterator(o)
		defer it.Close()
		for it.Rewind(); it.Valid(); it.Next() {
			keys = append(keys, it.Item().KeyCopy(nil))
		}
		return nil
	})
	if err != nil || len(keys) == 0 {
		return err
	}
	return s.txn(func(t *badger.Txn) error {
		for _, k := range keys {
			if err := t.Delete(k); err != nil {
				return err
			}
		}
		return nil
	})
}

func redoKey(i uint32) []byte { return binary.BigEndian.AppendUint32([]byte{keyRedo}, i) }

func appendRow(b []byte, r row) []byte {
	del := byte(0)
	if r.del {
		del = 1
	}
	b = append(b, del)
	b = binary.AppendUvarint(b, uint64(len(r.key)))
	b = binary.AppendUvarint(b, uint64(len(r.value)))
	return append(append(b, r.key...), r.value...)
}

func cutRow(b []byte) (row, []byte, error) {
	bad := fmt.Errorf("redo row: %w", ErrDamaged)
	r := row{del: b[0] == 1}
	k, n := binary.Uvarint(b[1:])
	if n <= 0 {
		return r, nil, bad
	}
	b = b[1+n:]
	l, n := binary.Uvarint(b)
	if n <= 0 {
		return r, nil, bad
	}
	b = b[n:]
	if k > uint64(len(b)) || l > uint64(len(b))-k {
		return r, nil, bad
	}
	r.key, r.value = b[:k:k], b[k:k+l:k+l]
	return r, b[k+l:], nil
}
