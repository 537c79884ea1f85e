package mailstore

import (
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"posthouse/mailstore/kv"
	"posthouse/mailstore/log"
	"posthouse/mesh"
	"posthouse/transport"
)

var update = flag.Bool("update", false, "write testdata anew")

// fixture is one of each record and row, as version 1 wrote them.
func fixture() (names []string, values map[string][]byte) {
	box := mesh.MailboxID{0: 0xb0, 15: 1}
	values = map[string][]byte{}
	add := func(name string, v []byte) { names = append(names, name); values[name] = v }
	add("deliver", encode(&deliverRecord{
		Version: 1, ID: transport.MessageID{0: 0x1d}, LegSeq: 7, Source: &log.Ref{Segment: 1, Offset: 4096, Seq: 7, CRC: 0xc0ffee},
		Prefix: []byte("Return-Path: <>\r\n"), Cuts: []cut{{From: 0, To: 9}}, Size: 1234, Time: 1795348800, Structure: []byte{1, 2, 3},
		Copies: []placed{{Mailbox: box, Folder: 1, UID: 5, ModSeq: 9}}, Trace: 1,
	}))
	add("append", encode(&appendRecord{Version: 1, Mailbox: box, Folder: 2, UID: 3, ModSeq: 4, System: bitSeen, Keywords: []string{"Later"}, Size: 10, Time: 1795348800, Structure: []byte{1}}))
	add("flags", encode(&flagsRecord{Version: 1, Mailbox: box, Folder: 2, ModSeq: 4, Op: FlagsAdd, System: bitDeleted, Keywords: []string{"Later"}, UIDs: packUIDs([]UID{1, 2, 3, 9}), UnchangedSince: 3}))
	add("expunge", encode(&expungeRecord{Version: 1, Mailbox: box, Folder: 2, ModSeq: 4, UIDs: packUIDs([]UID{7}), Force: true}))
	add("copy", encode(&copyRecord{Version: 1, Mailbox: box, From: 1, To: 2, First: 30, ToModSeq: 4, UIDs: packUIDs([]UID{7, 8}), Move: true, FromModSeq: 12}))
	add("folder", encode(&folderRecord{Version: 1, Mailbox: box, Op: opRename, New: []newFolder{{ID: 9, Name: "a", Use: `\Sent`}}, Folder: 3, From: "x", Name: "a/b"}))
	add("mailbox", encode(&mailboxRecord{Version: 1, Op: opCreate, Mailbox: box, New: []newFolder{{ID: 1, Name: inbox}}, Subscribe: []string{inbox}, Epoch: 2}))
	m := msg{uid: 5, mod: 12, created: 9, flags: bitSeen | 1<<systemBits, size: 1234, received: 1795348800, source: 7}
	m.setRef(log.Ref{Segment: 3, Offset: 81920, Seq: 11, CRC: 0xc0ffee})
	add("message row", m.row())
	f := Folder{name: "Sent", use: `\Sent`, uidNext: 6, mod: 12, floor: 2, messages: 3, unseen: 1, deleted: 1, size: 999, keywords: keywordTable{"Later"}}
	add("folder row", f.row())
	mb := Mailbox{counter: 9, subscribed: map[string]struct{}{inbox: {}, "a": {}}}
	add("mailbox row", mb.row())
	t := tomb{mod: 12}
	for i, u := range []UID{1, 2, 3, 9, 10} {
		t.bury(u, ModSeq(3+i))
	}
	add("expunge row", t.row())
	add("epoch row", epochRow(2))
	return names, values
}

func TestRecordsAndRowsOfVersion1AreStillWhatTheyWere(t *testing.T) {
	path := filepath.Join("testdata", "v1", "records.txt")
	names, values := fixture()
	var b strings.Builder
	for _, n := range names {
		fmt.Fprintf(&b, "%s: %s\n", n, hex.EncodeToString(values[n]))
	}
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), b.String()); diff != "" {
		t.Fatal(diff)
	}
	d, err := DecodeDelivered(values["deliver"])
	if err != nil || d.LegSeq != 7 || len(d.Mailboxes) != 1 {
		t.Fatal(d, err)
	}
	for _, r := range []record{&deliverRecord{}, &appendRecord{}, &flagsRecord{}, &expungeRecord{}, &copyRecord{}, &folderRecord{}, &mailboxRecord{}} {
		name := strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%T", r), "*mailstore."), "Record")
		if err := decode(values[name], r); err != nil {
			t.Fatal(name, err)
		}
		if diff := cmp.Diff(hex.EncodeToString(values[name]), hex.EncodeToString(encode(r))); diff != "" {
			t.Fatal(name, diff)
		}
	}
	var m msg
	if err := m.parse(5, values["message row"]); err != nil || hex.EncodeToString(m.row()) != hex.EncodeToString(values["message row"]) {
		t.Fatal(m, err)
	}
	var g tomb
	if err := g.parse(12, values["expunge row"]); err != nil || !slices.Equal(g.since(4, nil), []UID{1, 2}) {
		t.Fatal(g, err)
	}
	f := Folder{}
	if err := f.parse(values["folder row"]); err != nil || f.name != "Sent" || f.keywords[0] != "Later" {
		t.Fatal(err)
	}
}

func TestARecordOfANewerVersionIsRefused(t *testing.T) {
	if _, err := DecodeDelivered(encode(&deliverRecord{Version: 2})); err == nil {
		t.Fatal("read")
	}
}

func TestPackedUIDsComeBack(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		uids := rapid.SliceOfN(rapid.Uint32Range(1, 1<<32-2), 0, 40).Draw(rt, "uids")
		var in []UID
		for _, u := range uids {
			in = append(in, UID(u), UID(u+1))
		}
		in = growing(in)
		out, err := unpackUIDs(packUIDs(in))
		if err != nil || !slices.Equal(in, out) {
			rt.Fatal(in, out, err)
		}
	})
}

func FuzzRowsAndUIDs(f *testing.F) {
	_, values := fixture()
	for _, v := range values {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		unpackUIDs(b)
		DecodeDelivered(b)
		new(msg).parse(1, b)
		new(tomb).parse(1, b)
		new(Folder).parse(b)
	})
}

func FuzzForeignReturnPaths(f *testing.F) {
	f.Add([]byte("Return-Path: a\r\n b\r\nX: y\r\n\r\nReturn-Path: z\r\n"))
	f.Fuzz(func(t *testing.T, h []byte) {
		at := int64(0)
		for _, c := range foreignReturnPaths(h, true) {
			if c.From < at || c.To <= c.From || c.To > int64(len(h)) {
				t.Fatal(c, at)
			}
			at = c.To
		}
	})
}

func TestTombsRememberExactlyWhatExisted(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		uid, mod := UID(0), ModSeq(1)
		created := map[UID]ModSeq{}
		g := tomb{mod: 1 << 40}
		for range rapid.IntRange(0, 30).Draw(rt, "n") {
			uid += UID(rapid.IntRange(1, 2).Draw(rt, "gap"))
			mod += ModSeq(rapid.IntRange(0, 2).Draw(rt, "step"))
			created[uid] = mod
			g.bury(uid, mod)
		}
		var back tomb
		if err := back.parse(g.mod, g.row()); err != nil {
			rt.Fatal(err)
		}
		since := ModSeq(rapid.IntRange(0, int(mod)+1).Draw(rt, "since"))
		var want []UID
		for u, c := range created {
			if c <= since {
				want = append(want, u)
			}
		}
		slices.Sort(want)
		if got := back.since(since, nil); !slices.Equal(got, want) {
			rt.Fatal(got, want)
		}
	})
}

// days applies DELIVER records of these days and returns how many deliveries
// are remembered then.
func days(t *testing.T, each int, days ...int64) int {
	t.Helper()
	v, err := kv.Open(t.Context(), kv.Options{Memory: true})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	s := &Store{j: nil}
	seq := uint64(0)
	for _, d := range days {
		for range each {
			seq++
			b := &batch{Batch: &kv.Batch{}, seq: seq}
			k := claimKey{id: transport.MessageID{0: byte(seq), 1: byte(seq >> 8), 2: 1}}
			b.Put(dedupeKey(k), []byte{1})
			b.Put(dayKey(uint32(d), k), []byte{1})
			s.forgotten = min(s.forgotten, uint32(d))
			if err := s.purge(v, uint32(d), b); err != nil {
				t.Fatal(err)
			}
			if err := v.Apply(seq, b.Batch); err != nil {
				t.Fatal(err)
			}
		}
	}
	n := 0
	v.Scan([]byte("md"), nil, func(_, _ []byte) bool { n++; return true })
	return n
}

func TestDeliveriesAreForgottenAfterTheirTime(t *testing.T) {
	var spread []int64
	for d := int64(20000); d < 20150; d++ {
		spread = append(spread, d)
	}
	if n := days(t, 5, spread...); n < 101*5 || n > 102*5 {
		t.Errorf("%d remembered after 150 days, want those of about 101", n)
	}
	if n := days(t, 50, 20000, 20001, 20002, 20003, 20004, 20005, 20006, 20007, 23650, 20008); n != 500 {
		t.Errorf("a clock ten years ahead for a day left %d of 500", n)
	}
	if n := days(t, 50, 20000, 20200); n != 100 {
		t.Errorf("%d remembered: too few days are known to forget one", n)
	}
}
