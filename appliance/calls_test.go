package appliance

import (
	"bytes"
	"testing"

	"github.com/fxamacker/cbor/v2"
)

// FuzzCalls reads what a peer may send as a call or as the answer to one: it is
// bounded, and what was understood is the same when it is written and read again.
func FuzzCalls(f *testing.F) {
	for _, v := range []any{
		call{What: callWhose, Body: make([]byte, 32), Node: 7},
		reply{Fault: "Nobody has that key."},
		vouch{ID: 9, Addresses: []string{"brno.ours.example:44337", "[fd00::1]:44337"}},
		standing{Suspect: true, Boots: 4, Log: 1 << 40, Incarnation: 2, Led: true},
	} {
		var b bytes.Buffer
		if err := writeItem(&b, v); err != nil {
			f.Fatal(err)
		}
		f.Add(b.Bytes())
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		again[call](t, b)
		again[reply](t, b)
		again[standing](t, b)
		if v, ok := again[vouch](t, b); ok && len(v.Addresses) > 16 {
			t.Errorf("%d addresses of %v", len(v.Addresses), v.ID)
		}
	})
}

func again[T any](t *testing.T, b []byte) (v T, ok bool) {
	if readItem(bytes.NewReader(b), &v) != nil {
		return v, false
	}
	var out bytes.Buffer
	var w T
	if err := writeItem(&out, v); err != nil {
		t.Fatalf("%+v cannot be written: %v", v, err)
	}
	if err := readItem(&out, &w); err != nil {
		t.Fatalf("%+v cannot be read again: %v", v, err)
	}
	x, _ := cbor.Marshal(v)
	if y, _ := cbor.Marshal(w); !bytes.Equal(x, y) {
		t.Fatalf("%+v became %+v", v, w)
	}
	return v, true
}
