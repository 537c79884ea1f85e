package identity

import (
	"bytes"
	"crypto/rand"
	"testing"

	"posthouse/mesh"
)

func TestABoxOpensForItsNodeAndItsSubjectAlone(t *testing.T) {
	a, _ := Generate(rand.Reader)
	b, _ := Generate(rand.Reader)
	secret := []byte("$argon2id$v=19$m=19456,t=2,p=1$c2FsdA$a2V5")
	box, err := Seal(a.SealKey(), "verifier 1", secret)
	if err != nil || len(box) != len(secret)+SealOverhead {
		t.Fatal(len(box), err)
	}
	if bytes.Contains(box, secret[:8]) {
		t.Error("the secret stands in its box")
	}
	if got, err := a.Open("verifier 1", box); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := b.Open("verifier 1", box); err == nil {
		t.Error("another node opened it")
	}
	if _, err := a.Open("verifier 2", box); err == nil {
		t.Error("it passes for another secret")
	}
	for i := range box {
		bad := bytes.Clone(box)
		bad[i] ^= 1
		if _, err := a.Open("verifier 1", bad); err == nil {
			t.Fatalf("a changed byte %d was not noticed", i)
		}
	}
	for _, short := range [][]byte{nil, box[:10], box[:32], box[:SealOverhead]} {
		if _, err := a.Open("verifier 1", short); err == nil {
			t.Errorf("%d bytes were opened", len(short))
		}
	}
	again, _ := Seal(a.SealKey(), "verifier 1", secret)
	if bytes.Equal(again, box) {
		t.Error("two boxes of one secret are equal")
	}
}

func TestASealKeyFollowsFromTheNodesKey(t *testing.T) {
	seed := bytes.NewReader(bytes.Repeat([]byte{7}, 64))
	a, _ := Generate(seed)
	b, _ := Generate(seed)
	if a.SealKey() != b.SealKey() || a.SealKey().IsZero() || mesh.KeyHash(a.SealKey()) == a.Hash() {
		t.Error("the same seed gives different seal keys, or none")
	}
}

func TestASharedPairOpensWhatWasSealedToIt(t *testing.T) {
	private, public, err := NewSealPair()
	if err != nil {
		t.Fatal(err)
	}
	box, err := Seal(public, "x", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := OpenWith(private, "x", box); err != nil || string(got) != "secret" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := OpenWith(private[:5], "x", box); err == nil {
		t.Error("a cut key opened it")
	}
	if _, err := Seal(mesh.SealKey{}, "x", []byte("secret")); err == nil {
		t.Error("sealed to a key of low order")
	}
}

func BenchmarkSealAndOpen(b *testing.B) {
	k, _ := Generate(rand.Reader)
	secret := make([]byte, 97) // a verifier
	b.Run("seal", func(b *testing.B) {
		for b.Loop() {
			if _, err := Seal(k.SealKey(), "verifier", secret); err != nil {
				b.Fatal(err)
			}
		}
	})
	box, _ := Seal(k.SealKey(), "verifier", secret)
	b.Run("open", func(b *testing.B) {
		for b.Loop() {
			if _, err := k.Open("verifier", box); err != nil {
				b.Fatal(err)
			}
		}
	})
}
