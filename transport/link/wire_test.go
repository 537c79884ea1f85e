package link

import (
	"bytes"
	"flag"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"posthouse/mesh"
)

var update = flag.Bool("update", false, "rewrite testdata")

func testHello() *hello {
	return &hello{Version: 1, Node: 0xfedcba9876543210, Class: Bulk, Nonce: bytes.Repeat([]byte{7}, 16), Seq: 3, BootCount: 4, LogEnd: 5 << 40, Lineage: []byte("lineage")}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := "testdata/v1/" + name
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s: the format of version 1 has changed:\n%s", name, diff)
	}
}

func TestVersion1OnTheWire(t *testing.T) {
	b, err := testHello().encode()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "hello", b)
	h, err := readHello(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(testHello(), h); diff != "" {
		t.Error(diff)
	}
	for name, h := range map[string]header{
		"service": {kind: kindService, class: Control, name: "relay/1"},
		"via":     {kind: kindVia, class: Bulk, node: 0x0102030405060708},
		"spliced": {kind: kindSpliced, class: Bulk, node: 0x0102030405060708},
		"peers":   {kind: kindPeers, class: Control},
	} {
		golden(t, "header-"+name, h.encode())
		got, err := readHeader(bytes.NewReader(h.encode()))
		if err != nil || got != h {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func TestHellosOfLaterVersionsAreRead(t *testing.T) {
	h := testHello()
	h.Version = 9
	b, _ := h.encode()
	// One more field: key 99.
	body := append([]byte{b[2] + 1}, b[3:]...)
	body = append(body, 0x18, 99, 0x61, 'x')
	got, err := readHello(bytes.NewReader(append([]byte{0, byte(len(body))}, body...)))
	if err != nil || got.Node != h.Node {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestHellosThatMakeNoSenseAreRefused(t *testing.T) {
	for name, spoil := range map[string]func(*hello){
		"version 0":      func(h *hello) { h.Version = 0 },
		"no node":        func(h *hello) { h.Node = 0 },
		"unknown class":  func(h *hello) { h.Class = 3 },
		"short nonce":    func(h *hello) { h.Nonce = h.Nonce[:15] },
		"long lineage":   func(h *hello) { h.Lineage = make([]byte, 65) },
		"larger than is": func(h *hello) { h.Lineage = make([]byte, 900) },
	} {
		h := testHello()
		spoil(h)
		b, err := h.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := readHello(bytes.NewReader(b)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestServiceNames(t *testing.T) {
	for name, ok := range map[string]bool{
		"relay/1": true, "a": true, "gossip-2.x/10": true, strings.Repeat("a", maxName): true,
		"": false, strings.Repeat("a", maxName+1): false, "Relay/1": false, "a b": false, "é": false,
	} {
		if got := checkName(name) == nil; got != ok {
			t.Errorf("%q: %v", name, got)
		}
	}
}

func TestAddressesStandForNodes(t *testing.T) {
	a := Addr(0x0102030405060708)
	if a.String() != "[fd70:6f73:7468:0:102:304:506:708]:44337" {
		t.Error(a)
	}
	if !a.(*net.TCPAddr).IP.IsPrivate() {
		t.Error("not a unique local address")
	}
}

func FuzzHello(f *testing.F) {
	b, _ := testHello().encode()
	f.Add(b)
	f.Add([]byte{0, 1, 0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readHello(bytes.NewReader(b))
		if err != nil {
			return
		}
		again, err := h.encode()
		if err != nil {
			t.Fatal(err)
		}
		if h2, err := readHello(bytes.NewReader(again)); err != nil || !cmp.Equal(h, h2) {
			t.Errorf("%+v became %+v, %v", h, h2, err)
		}
	})
}

func FuzzHeader(f *testing.F) {
	f.Add(header{kind: kindService, class: Control, name: "relay/1"}.encode())
	f.Add(header{kind: kindVia, class: Bulk, node: 9}.encode())
	f.Add(header{kind: kindPeers, class: Control}.encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := readHeader(bytes.NewReader(b))
		if err == nil && !bytes.HasPrefix(b, h.encode()) {
			t.Errorf("%x was read as %+v", b, h)
		}
	})
}

func FuzzPeerList(f *testing.F) {
	f.Add(encodePeerList([]mesh.NodeID{1, 2, 1 << 63}))
	f.Add([]byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		ids, err := readPeerList(bytes.NewReader(b))
		if err == nil && !bytes.HasPrefix(b, encodePeerList(ids)) {
			t.Errorf("%x was read as %v", b, ids)
		}
	})
}
