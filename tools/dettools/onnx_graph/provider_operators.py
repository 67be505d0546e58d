"""Which operators onnxruntime's CUDA provider and TensorRT take: facts from their own pages, with their versions.

The CPU's are asked of the installed onnxruntime itself. These two cannot be asked without a GPU and their libraries.
Types and operator versions are not in the tables: an operator that is listed may still fall back for its types.
"""

CUDA_SOURCE = (
    "onnxruntime's docs/OperatorKernels.md, CUDAExecutionProvider, which knows operators up to opset 27; "
    "NonMaxSuppression, which it leaves out, by the provider's own kernels (1.31)"
)
TENSORRT_SOURCE = "onnx-tensorrt's docs/operators.md for TensorRT 10.15, opset 9 to 24"
TENSORRT_OPSETS = (9, 24)


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CUDA = _names("""
    Abs Add Affine And ArgMax ArgMin Attention AveragePool BatchNormalization Cast Ceil Clip Compress Concat
    ConcatFromSequence ConstantOfShape Conv ConvTranspose Cos Crop CumSum DeformConv DepthToSpace DequantizeLinear Div
    Dropout DynamicSlice Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu
    Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample HardSigmoid HardSwish Identity If ImageScaler
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    LpNormalization MatMul MatMulInteger Max MaxPool Min Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
    ParametricSoftplus Pow QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round ScaledTanh
    Scan Scatter ScatterElements ScatterND Selu SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
    SequenceLength Shape Shrink Sigmoid Sign SimplifiedLayerNormalization Sin Size Slice Softmax Softplus Softsign
    SpaceToDepth Split Sqrt Squeeze Sub Sum Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze
    Upsample Where Xor
""")
CUDA_MICROSOFT = _names("""
    Attention BeamSearch BiasAdd BiasDropout BiasGelu BiasSoftmax BiasSplitGelu BitmaskBiasDropout BitmaskDropout
    CausalConvWithState ComplexMul ComplexMulConj ConvTransposeWithDynamicPads DecoderAttention
    DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention DequantizeLinear DequantizeWithOrder DynamicTimeWarping
    EmbedLayerNormalization FastGelu FusedConv FusedMatMul GatedRelativePositionBias GatherBlockQuantized Gelu
    GemmFloat8 GemmaRotaryEmbedding GreedySearch GridSample GroupNorm GroupQueryAttention Inverse Irfft LinearAttention
    LongformerAttention MatMulBlockQuantizedFp4Weight MatMulBlockQuantizedFp8Weight MatMulBnb4 MatMulNBits MoE
    MultiHeadAttention NGramRepeatBlock NhwcConv PackedAttention PackedMultiHeadAttention PagedAttention QAttention QMoE
    QOrderedAttention QOrderedGelu QOrderedLayerNormalization QOrderedLongformerAttention QOrderedMatMul QuantizeLinear
    QuantizeWithOrder QuickGelu RelativePositionBias RemovePadding RestorePadding Rfft RotaryEmbedding Sampling
    SkipGroupNorm SkipLayerNormalization SkipSimplifiedLayerNormalization SparseAttention TransposeMatMul Trilu
    UnfoldTensor WhisperBeamSearch
""")
TENSORRT = _names("""
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow
    Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv
    DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If ImageScaler
    InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop
    LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression
    NonZero Not OneHot Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RMSNormalization RNN RandomNormal
    RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp
    ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign
    RotaryEmbedding Round STFT ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh
    Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh TensorScatter ThresholdedRelu
    Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
""")
# Of operators that detectors use: what TensorRT asks of them.
TENSORRT_CONDITIONS = {
    "DeformConv": "the same padding at both ends of an axis",
    "GridSample": "4-D input",
    "If": "the branches' outputs have the same rank and different names",
    "Loop": "loop-carried shapes stay the same, scan outputs have a fixed length",
    "MaxPool": "no Indices output, no dilation",
    "NonZero": "FP32 or FP16 input",
    "OneHot": "depth is a constant",
    "Resize": "nearest or linear, no antialiasing, aspect ratio policy stretch",
    "ScatterND": "reduction none",
    "TopK": "sorted, K below 3840",
}
