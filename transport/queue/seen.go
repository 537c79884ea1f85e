package queue

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"posthouse/transport"
)

// clock notes the time of a record, forgets old ids, and keeps the time.
func (e *edit) clock(s stamp) {
	q := e.q
	q.mu.Lock()
	q.clock.saw(s)
	save := s.Q >= q.saved+1e9
	if save {
		q.saved = s.Q
	}
	today := int64(s.Q / day)
	forget := today != q.swept
	q.mu.Unlock()
	if save {
		if v, err := encMode.Marshal(s); err == nil {
			e.b.Put([]byte(keyClock), v)
		}
	}
	if !forget {
		return
	}
	n := 0
	_ = q.j.View().Scan([]byte(preExpire), nil, func(k, _ []byte) bool {
		if int64(binary.BigEndian.Uint32(k[len(preExpire):])) > today || n == 500 {
			return false
		}
		n++
		key := slices.Clone(k)
		e.b.Delete(key)
		e.b.Delete(key[len(preExpire)+4:])
		return true
	})
	if n < 500 {
		q.mu.Lock()
		q.swept = today
		q.mu.Unlock()
	}
}

func seenKey(id transport.MessageID, rcpt string) []byte {
	h := sha256.Sum256([]byte(rcpt))
	return append(append([]byte(preSeen), id[:]...), h[:8]...)
}

func (e *edit) lookup(k []byte) (*seenRow, error) {
	if s, ok := e.seen[string(k)]; ok {
		return s, nil
	}
	return e.q.seenRow(k)
}

func (q *Queue) seenRow(k []byte) (*seenRow, error) {
	v, ok, err := q.j.View().Get(k)
	if err != nil || !ok {
		return nil, err
	}
	s := new(seenRow)
	return s, decMode.Unmarshal(v, s)
}

func (e *edit) remember(k []byte, s *seenRow, at stamp) {
	v, err := encMode.Marshal(s)
	if err != nil {
		return
	}
	e.seen[string(k)] = s
	e.b.Put(k, v)
	e.expire(k, at)
}

func (e *edit) expire(k []byte, at stamp) {
	x := binary.BigEndian.AppendUint32([]byte(preExpire), uint32((at.Q+seenFor)/day)+1)
	e.b.Put(append(x, k...), nil)
}

// keepSeen follows a kept recipient's state in what is remembered of its id.
func (e *edit) keepSeen(r *row, x *rcpt, at stamp, forget bool) error {
	k := seenKey(r.ID, x.R.Key())
	if forget {
		e.seen[string(k)] = nil
		e.b.Delete(k)
		return nil
	}
	s, err := e.lookup(k)
	if err != nil || s == nil {
		return err
	}
	c := *s
	c.State, c.Last = x.State, x.Last
	v, err := encMode.Marshal(&c)
	if err != nil {
		return err
	}
	e.seen[string(k)] = &c
	e.b.Put(k, v)
	return nil
}

// gate remembers that a message of ours may be known to gateways.
func (e *edit) gate(id transport.MessageID, seq uint64, at stamp) error {
	k := append([]byte(preGate), id[:]...)
	if _, ok, err := e.q.j.View().Get(k); err != nil || ok {
		return err
	}
	e.b.Put(k, binary.BigEndian.AppendUint64(nil, seq))
	e.expire(k, at)
	return nil
}
