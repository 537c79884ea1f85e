package election

import (
	"bytes"
	"flag"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/raft"
	"github.com/hashicorp/raft-wal/types"

	"posthouse/mesh"
)

var update = flag.Bool("update", false, "write the fixtures anew")

// fixture compares with, or writes, testdata/v1/name, and returns what stands
// there.
func fixture(t *testing.T, name string, now []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", "v1", name)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, now, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(old, now) {
		t.Errorf("%s: version 1 was written differently", name)
	}
	return old
}

func TestTheFirstFormatsOpenForEver(t *testing.T) {
	t.Run("log entry", func(t *testing.T) {
		var b bytes.Buffer
		codec{}.Encode(entry(3), &b)
		var l raft.Log
		if err := (codec{}).Decode(fixture(t, "entry", b.Bytes()), &l); err != nil || l.Index != 3 || len(l.Data) != 53 {
			t.Errorf("%+v %v", l, err)
		}
	})
	lines := chain{{ID: mesh.ID{1}, Generation: 1}, {ID: mesh.ID{2}, Generation: 2, Fork: 7, Superseded: true}, {ID: mesh.ID{3}, Generation: 3, Fork: 9}}
	t.Run("lineage header", func(t *testing.T) {
		var b bytes.Buffer
		writeHeader(&b, lines)
		c, err := readHeader(bytes.NewReader(fixture(t, "header", b.Bytes())))
		if err != nil || !cmp.Equal(c, lines) {
			t.Errorf("%+v %v", c, err)
		}
	})
	t.Run("record", func(t *testing.T) {
		want := record{Chain: lines, Switching: true, Must: true, Wiped: true, Next: lines[:1], Index: 5, Term: 6, Rival: lines[:2],
			Forked: []Command{{Index: 8, ID: mesh.ID{9}, At: time.Unix(1_800_000_000, 0).UTC(), Actor: "alice", Text: "created user bob"}}}
		b, err := cbor.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		s := NewMemStorage()
		s.save(recordName, fixture(t, "record", b))
		got, err := loadRecord(s)
		for i := range got.Forked {
			got.Forked[i].At = got.Forked[i].At.UTC()
		}
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Error(d, err)
		}
	})
	t.Run("snapshot", func(t *testing.T) {
		s := snapshotFiles{osDisk{}, t.TempDir()}
		k, err := s.Create(1, 10, 3, raft.Configuration{Servers: []raft.Server{{ID: "1", Address: "1"}}}, 2, nil)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(k, "the state")
		if err := k.Close(); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(s.dir, k.ID()+snapSuffix)
		now, _ := os.ReadFile(path)
		os.WriteFile(path, fixture(t, "snapshot", now), 0o600)
		m, r, err := s.Open(k.ID())
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		if b, _ := io.ReadAll(r); string(b) != "the state" || m.Index != 10 || m.ConfigurationIndex != 2 || len(m.Configuration.Servers) != 1 {
			t.Errorf("%q %+v", b, m)
		}
	})
	t.Run("meta file", func(t *testing.T) {
		dir := t.TempDir()
		path := filepath.Join(dir, "meta")
		m := &metaFile{disk: osDisk{}}
		if _, err := m.Load(dir); err != nil {
			t.Fatal(err)
		}
		want := types.PersistentState{NextSegmentID: 3, Segments: []types.SegmentInfo{{ID: 2, BaseIndex: 100, MinIndex: 101, Codec: codecID, CreateTime: time.Unix(1_800_000_000, 5), SizeLimit: 1 << 20}}}
		if err := m.CommitState(want); err != nil {
			t.Fatal(err)
		}
		if err := m.SetStable([]byte("CurrentTerm"), []byte{42}); err != nil {
			t.Fatal(err)
		}
		m.Close()
		whole, _ := os.ReadFile(path)
		slot := fixture(t, "meta-slot", bytes.TrimRight(whole[:slotSize], "\x00"))
		img := make([]byte, 2*slotSize)
		copy(img, slot)
		os.WriteFile(path, img, 0o600)
		m = &metaFile{disk: osDisk{}}
		got, err := m.Load(dir)
		defer m.Close()
		if d := cmp.Diff(want, got); d != "" || err != nil {
			t.Error(d, err)
		}
		if v, _ := m.GetStable([]byte("CurrentTerm")); !bytes.Equal(v, []byte{42}) {
			t.Errorf("term %v", v)
		}
	})
}
