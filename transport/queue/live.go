package queue

import (
	"errors"

	"posthouse/mailstore/journal"
	"posthouse/mailstore/log"
)

var _ journal.Keeper = (*Queue)(nil)

// Live implements journal.Keeper: a message with a leg that has not ended, or
// owes a report, needs its ACCEPT record.
func (q *Queue) Live(mark func(seq uint64, size int64)) error {
	var bad error
	err := q.j.View().Scan([]byte(preLeg), nil, func(k, v []byte) bool {
		_, seq, ok := parseLegKey(k)
		h, _, err := decodeHead(v)
		if !ok || err != nil {
			bad = errRow
			return false
		}
		mark(seq, h.size)
		return true
	})
	if err = errors.Join(err, bad); err != nil {
		return err
	}
	return q.j.View().Scan([]byte(preMsg), nil, func(k, _ []byte) bool {
		mark(beUint64(k[len(preMsg):]), 0)
		return true
	})
}

// Lasting implements journal.Keeper.
func (q *Queue) Lasting(log.Kind) bool { return false }
